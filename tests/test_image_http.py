"""Images behind a real HTTP server: directories, patterns, single files with a query, and what a server may answer."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
from image_sets import COUNT, KINDS, make_samples

from ldt.data.images import open_images
from ldt.data.shards import remote
from ldt.errors import InputError, RunError

import peers  # noqa: F401  isort: skip

import aiohttp  # noqa: F401  isort: skip  (installed with the peers; that it is missing is said here, by name)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, and errors below /status/NUMBER/."""

    asked: dict[str, int] = {}

    def do_GET(self):
        Handler.asked[self.path] = Handler.asked.get(self.path, 0) + 1
        if self.path.startswith("/status/"):
            self.send_error(int(self.path.split("/")[2]))
            return
        if self.path.startswith("/shaky/") and Handler.asked[self.path] % 3:  # two of three requests fail
            self.send_error(503)
            return
        wanted, path = self.headers.get("Range"), Path(self.translate_path(self.path.replace("/shaky", "")))
        if not wanted or not path.is_file():
            self.path = self.path.replace("/shaky", "")
            super().do_GET()
            return
        size = path.stat().st_size
        first, last = wanted.removeprefix("bytes=").split("-")
        content = path.read_bytes()[int(first) : min(int(last or size - 1), size - 1) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}")
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self):
        if self.path.startswith("/status/"):
            self.send_error(int(self.path.split("/")[2]))
            return
        self.path = self.path.replace("/shaky", "")
        super().do_HEAD()

    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SAMPLES = make_samples(12)


def same(source):
    assert [source.content(i) for i in range(12)] == [s[1] for s in SAMPLES]
    assert [source.label(i) for i in range(12)] == [s[2] for s in SAMPLES]
    assert [source.caption(i) for i in range(12)] == [s[3] for s in SAMPLES] and COUNT > 12
    return list(source.classes) == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    "kind", ["directory", "web tars", "parquet", "mds", "jsonl", "class tar", "zip", "plain parquet"]
)
def test_every_kind_over_http(tmp_path, address, kind):
    path = KINDS[kind](tmp_path / "set", SAMPLES)
    assert same(open_images(f"{address}/{path.relative_to(tmp_path)}"))


def test_patterns_queries_and_failures_over_http(tmp_path, address):
    KINDS["web tars"](tmp_path / "set", SAMPLES)
    assert same(open_images(f"{address}/set/*.tar"))
    assert same(open_images(f"{address}/set/{{00000..00000}}.tar"))
    assert same(open_images(f"{address}/set/00000.tar?X-Amz-Signature=1&download=true"))
    assert same(open_images(f"{address}/shaky/set/00000.tar"))


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("status/401/set.tar", InputError, "status/401/set.tar may not be read .*check the credentials"),
        ("status/403/set", InputError, "status/403/set may not be read .*check the credentials"),
        ("status/403/*.tar", InputError, "may not be read .*check the credentials"),
        ("status/404/set.zip", InputError, "status/404/set.zip does not exist; check the address"),
        ("status/503/set.tar", RunError, "status/503/set.tar could not be read in 5 attempts"),
        ("status/503/set", RunError, "could not be read in 5 attempts"),
        ("nothing/*.tar", InputError, "stands for no file"),
    ],
)
def test_what_a_server_may_answer(address, path, kind, said):
    with pytest.raises(kind, match=said):
        open_images(f"{address}/{path}")
