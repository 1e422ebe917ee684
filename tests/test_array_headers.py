"""Arrays are read right by many threads at once: numpy parses their headers, and Python 3.11's parser minds company."""

import ast
import gc
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from ldt.data.images.listing import Listing, Table
from ldt.data.latent_sources import open_latents
from ldt.files import beside_threads, load_npy, npy_header
from ldt.metrics import reference

THREADS, TIMES = 8, 600
ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def written():
    stream = io.BytesIO()
    np.save(stream, ARRAY)
    return stream.getvalue()


class Knot:
    """Garbage that gives way to other threads while it is collected, in the middle of a parser's work."""

    def __init__(self):
        self.me = self

    def __del__(self):
        for _ in range(50):
            pass


def test_a_header_is_parsed_in_company():
    """Without another try some of these calls fail with "AST constructor recursion depth mismatch"."""
    content, interval, threshold = written(), sys.getswitchinterval(), gc.get_threshold()

    def often():
        for _ in range(TIMES):
            Knot()
            assert npy_header(content)[0] == ARRAY.shape

    sys.setswitchinterval(1e-6)
    gc.set_threshold(1)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(often) for _ in range(THREADS)]:
                future.result()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)


def a_header(_):
    content = written()
    return lambda: npy_header(content)[0] == ARRAY.shape


def a_stream(_):
    """From where it is."""
    stream = io.BytesIO(b"before" + written())
    stream.seek(6)
    return lambda: np.array_equal(load_npy(stream), ARRAY)


def a_file(directory):
    (directory / "a.npy").write_bytes(written())
    return lambda: np.array_equal(load_npy(directory / "a.npy"), ARRAY)


def latents(directory):
    np.savez(directory / "0.npz", moments=np.full((8, 4, 4), -1, np.float32), label=1)
    opened = open_latents(str(directory), 1.0)
    return lambda: opened.moments(0).shape == (2, 4, 4, 4)


def an_index(_):
    listing = Listing()
    listing.add("a.png", "a", size=3)
    content = listing.table().to_bytes()
    return lambda: [*Table.from_bytes(content).names] == ["a.png"]


def statistics(directory):
    np.savez(directory / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    detector = SimpleNamespace(name="three", outputs={"features": 3}, hash="")
    return lambda: reference.load(directory / "a.npz", detector).statistics("features").mean_D.shape == (3,)


@pytest.mark.parametrize("reader", [a_header, a_stream, a_file, latents, an_index, statistics])
def test_a_parser_that_another_thread_has_disturbed_is_asked_again(monkeypatch, tmp_path, reader):
    read, parse, calls = reader(tmp_path), ast.literal_eval, []

    def disturbed(text):
        calls.append(None)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=18, after=16)")
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", disturbed)
    assert read() and len(calls) > 1


def test_what_goes_wrong_each_time_is_raised():
    def read():
        raise SystemError("a broken interpreter")

    with pytest.raises(SystemError, match="broken"):
        beside_threads(read)
