"""Shards over real connections: one download a node by several processes, and servers that fall silent."""

import multiprocessing
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from shard_data import write_shards

from ldt.data.shards import open_shards, remote
from ldt.errors import RunError

# what a stalled request leaves behind ends when the server does
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
COUNTS = [7, 12, 1, 10]
PROCESSES = multiprocessing.get_context("forkserver")


class PlainHTTP(fsspec.AbstractFileSystem):
    """As little of a back-end as can be, without any timeout of its own."""

    protocol = "plain"
    cachable = False

    def _open(self, path, mode="rb", **_):
        return urllib.request.urlopen(f"http://{self._strip_protocol(path)}")

    def cat_file(self, path, start=None, end=None, **_):
        with self._open(path) as answer:
            return answer.read()


fsspec.register_implementation("plain", PlainHTTP, clobber=True)


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/data and counts; `silent[name]` is after how many bytes it stops to answer for how many times."""
    write_shards(tmp_path / "data", COUNTS)
    asked, silent, over = Counter(), {}, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            asked[name] += 1
            content = (tmp_path / "data" / name).read_bytes()
            sent, times = silent.get(name, (0, 0))
            stalls = asked[name] <= times
            if not stalls or sent:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:sent] if stalls else content)
                self.wfile.flush()
            if stalls:
                over.wait(60)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"plain://127.0.0.1:{http.server_port}", asked, silent
        over.set()
        http.shutdown()
        thread.join()


def read_all(address, cache, barrier, answers):
    """One process of a node."""
    shards = open_shards(address, cache)
    barrier.wait()
    counts = shards.manifest.counts
    records = shards.read(np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts]))
    answers.put(float(records.moments_n2CHW.astype(np.float64).sum()))


def test_the_processes_of_a_node_download_each_shard_once(server, tmp_path):
    address, asked, _ = server
    PROCESSES.set_forkserver_preload(["ldt.data.loader"])
    barrier, answers = PROCESSES.Barrier(4), PROCESSES.Queue()
    arguments = (address, str(tmp_path / "cache"), barrier, answers)
    processes = [PROCESSES.Process(target=read_all, args=arguments) for _ in range(4)]
    for p in processes:
        p.start()
    sums = {answers.get(timeout=60) for _ in processes}
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0] * 4 and len(sums) == 1
    assert {n: k for n, k in asked.items() if n.endswith(".tar")} == {f"shard-{i:08d}.tar": 1 for i in range(4)}


@pytest.mark.parametrize("sent", [0, 300])
@pytest.mark.parametrize("name", ["shard-00000001.tar", "manifest.json"])
def test_a_server_that_falls_silent_is_asked_again_and_then_named(server, tmp_path, monkeypatch, name, sent):
    address, asked, silent = server
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "STALLED", 0.2)
    silent[name] = (sent, 2)
    assert len(open_shards(address, str(tmp_path / "one")).read([1], [0]).label_n) == 1
    assert asked[name] == 3
    silent[name] = (sent, 99)
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"{name} could not be read in 5 attempts.*no answer within 0.2 s"):
        open_shards(address, str(tmp_path / "two")).read([1], [0])
    assert asked[name] == 8 and time.monotonic() - started < 30
    assert not [p for p in (tmp_path / "two").glob("*") if p.is_file()]
