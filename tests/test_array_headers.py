"""Arrays are read right by many threads at once: numpy parses their headers, and Python 3.11's parser minds company."""

import gc
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ldt.data.images.listing import Listing, Table
from ldt.data.latent_files import _member
from ldt.files import beside_threads, load_npy, npy_header

THREADS, TIMES = 8, 1500
ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


class Knot:
    """Garbage that gives way to other threads while it is collected, in the middle of a parser's work."""

    def __init__(self):
        self.me = self

    def __del__(self):
        for _ in range(50):
            pass


@pytest.fixture
def crowd():
    """Calls a function many times from many threads that take turns as often as they can."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(1)

    def call(function):
        def often():
            for _ in range(TIMES):
                Knot()
                function()

        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(often) for _ in range(THREADS)]:
                future.result()

    yield call
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


def written():
    stream = io.BytesIO()
    np.save(stream, ARRAY)
    return stream.getvalue()


def listed():
    listing = Listing()
    listing.add("a.png", "a", size=3)
    return listing.table()


def test_what_reads_arrays_minds_no_company(crowd, tmp_path):
    """Each of these failed now and then with "AST constructor recursion depth mismatch"."""
    content, path, table = written(), tmp_path / "0.npz", listed().to_bytes()
    np.savez(path, moments=ARRAY)
    crowd(lambda: npy_header(content))
    crowd(lambda: load_npy(io.BytesIO(content)))
    crowd(lambda: _member(path, "moments"))
    crowd(lambda: Table.from_bytes(table))


def test_an_array_is_read_from_where_its_stream_is():
    stream = io.BytesIO(b"before" + written())
    stream.seek(6)
    np.testing.assert_array_equal(load_npy(stream), ARRAY)
    shape, fortran, dtype, size = npy_header(written())
    assert (shape, fortran, dtype, size) == (ARRAY.shape, False, ARRAY.dtype, len(written()) - ARRAY.nbytes)


def test_what_goes_wrong_each_time_is_raised():
    calls = []

    def read():
        calls.append(None)
        raise SystemError("a broken interpreter")

    with pytest.raises(SystemError, match="broken"):
        beside_threads(read)
    assert len(calls) > 1
