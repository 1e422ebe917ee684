"""Remote shards: the same samples, one download a node, a cache that keeps to its limit, damage never kept."""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import threading

import fsspec
import numpy as np
import pytest
from shard_data import make_loader, write_shards

from ldt.data.shards import open_shards, open_validation, remote
from ldt.errors import InputError, RunError

COUNTS = [7, 12, 1, 10, 9, 9]
SETTINGS = {"batch": 8, "seed": 5, "streams": 3, "window": 6}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


@pytest.fixture(params=["tar", "mds"])
def local(request, tmp_path):
    write_shards(tmp_path / "data", COUNTS, request.param)
    write_shards(tmp_path / "data" / "validation", [3], request.param)
    return tmp_path / "data"


@pytest.fixture(params=["file", "memory"])
def address(request, local):
    if request.param == "file":
        yield f"file://{local}"
        return
    memory = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/data/{path.relative_to(local)}", path.read_bytes())
    yield "memory://bucket/data"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def downloads(monkeypatch):
    """Names of all files that were asked for, in order."""
    asked: list[str] = []
    real = remote.Remote.chunks

    def chunks(self, name):
        asked.append(name)
        return real(self, name)

    monkeypatch.setattr(remote.Remote, "chunks", chunks)
    return asked


def digests(shards, steps=12):
    with make_loader(shards, **SETTINGS) as loader:
        return [step.digest for step in itertools.islice(loader.steps(), steps)]


def read_all(shards):
    counts = shards.manifest.counts
    shard = np.repeat(np.arange(len(counts)), counts)
    return shards.read(shard, np.concatenate([np.arange(n) for n in counts]))


def test_remote_steps_are_the_local_ones_and_each_shard_comes_once(local, address, tmp_path, downloads):
    expected = digests(open_shards(local))
    cache = tmp_path / "cache"
    assert digests(open_shards(address, str(cache))) == expected
    assert digests(open_shards(address, str(cache))) == expected  # another process of the node
    assert sorted(downloads) == sorted(set(downloads)) and len(downloads) == len(COUNTS)
    assert open_shards(open_validation(address), str(cache)).manifest.samples == 3
    assert open_validation(f"{address}/validation") is None


def test_many_readers_at_once_download_once(local, tmp_path, downloads):
    readers = [open_shards(f"file://{local}", str(tmp_path / "cache")) for _ in range(8)]
    threads = [threading.Thread(target=read_all, args=(r,)) for r in readers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(downloads) == len(COUNTS)


def test_the_cache_keeps_to_its_limit_and_drops_the_oldest(local, tmp_path, downloads):
    sizes = open_shards(local).manifest.table["bytes"]
    limit = int(sizes.max() + sizes.min())
    cache = tmp_path / "cache"
    shards = open_shards(f"file://{local}", str(cache), limit / 1e9)
    expected = read_all(open_shards(local)).moments_n2CHW
    for _ in range(2):
        np.testing.assert_array_equal(read_all(shards).moments_n2CHW, expected)
        assert sum(p.stat().st_size for p in cache.iterdir() if p.is_file()) <= limit
    with pytest.raises(InputError, match=r"more than the whole cache.*cache_gb"):
        read_all(open_shards(f"file://{local}", str(tmp_path / "small"), (int(sizes.max()) - 1) / 1e9))


def test_least_recently_used_goes_first(tmp_path):
    write_shards(tmp_path / "data", [5, 5, 5])
    size = int(open_shards(tmp_path / "data").manifest.table["bytes"][0])
    cache = tmp_path / "cache"
    shards = open_shards(f"file://{tmp_path / 'data'}", str(cache), 2.5 * size / 1e9)
    for age, shard in ((30, 0), (20, 1)):
        path = shards.fetch(shard)
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    shards.fetch(0)  # used again: 1 is the oldest now
    shards.fetch(2)
    names = {p.name for p in cache.iterdir() if p.is_file()}
    assert names == {shards.fetch(i).name for i in (0, 2)}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_bad_remote_shard_is_named_and_not_kept(local, tmp_path, damage):
    path = sorted(local.glob("shard-00000001.*"))[0]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[100] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "missing":
        path.unlink()
    cache = tmp_path / "cache"
    shards = open_shards(f"file://{local}", str(cache))
    shards.read([0], [0])
    with pytest.raises(InputError, match=r"shard-00000001.*(damaged|missing)"):
        shards.read([1], [0])
    assert len([p for p in cache.iterdir() if p.is_file()]) == 1


@pytest.mark.parametrize("failures", [1, 4, 5])
@pytest.mark.parametrize("kind", ["error", "short", "flipped"])
def test_a_failing_network_is_tried_again(local, tmp_path, monkeypatch, failures, kind):
    left = itertools.count()
    real = remote.Remote.chunks

    def chunks(self, name):
        bad = next(left) < failures
        for chunk in real(self, name):
            if bad and kind == "error":
                raise ConnectionResetError("peer went away")
            yield (chunk[:-1] if kind == "short" else bytes([chunk[0] ^ 1]) + chunk[1:]) if bad else chunk

    monkeypatch.setattr(remote.Remote, "chunks", chunks)
    shards = open_shards(f"file://{local}", str(tmp_path / "cache"))
    if failures < remote.ATTEMPTS:
        assert shards.read([1], [0]).label_n.shape == (1,)
    else:
        # bytes that are wrong every time are the remote's own, a network may come back
        with pytest.raises(RunError if kind == "error" else InputError, match="shard-00000001"):
            shards.read([1], [0])
        assert not [p for p in (tmp_path / "cache").iterdir() if p.is_file()]


def test_a_cached_file_damaged_on_the_nodes_disk_is_fetched_again(local, tmp_path, downloads):
    shards = open_shards(f"file://{local}", str(tmp_path / "cache"))
    path = shards.fetch(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected = open_shards(local).read([1], [3]).moments_n2CHW
    np.testing.assert_array_equal(shards.read([1], [3]).moments_n2CHW, expected)
    assert len(downloads) == 2


def test_a_full_disk_is_said_and_leaves_nothing(local, tmp_path):
    shards = open_shards(f"file://{local}", str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(RunError, match="cache is full"):
            shards.read([1], [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_file()]
    assert len(shards.read([1], [0]).label_n) == 1


def test_mistakes_with_addresses(tmp_path):
    for address, cache, said in [
        ("memory://nowhere", str(tmp_path), r"memory://nowhere has no manifest\.json"),
        ("memory://nowhere", None, r"data\.cache_dir"),
        ("nothing://nowhere", str(tmp_path), "can't be opened"),
    ]:
        with pytest.raises(InputError, match=said):
            open_shards(address, cache)
    with contextlib.suppress(FileExistsError):
        (tmp_path / "file").write_text("x")
    write_shards(tmp_path / "data", [2])
    with pytest.raises(InputError, match="cache_dir"):
        open_shards(f"file://{tmp_path / 'data'}", str(tmp_path / "file"))


def test_a_cache_that_is_removed_while_it_is_in_use_is_made_again(local, tmp_path):
    cache = tmp_path / "cache"
    shards = open_shards(f"file://{local}", str(cache))
    expected = read_all(open_shards(local)).moments_n2CHW
    shards.read([0], [0])
    shutil.rmtree(cache)
    np.testing.assert_array_equal(read_all(shards).moments_n2CHW, expected)
    for path in cache.iterdir():  # cleaned by somebody, file by file
        if path.is_file():
            path.unlink()
    fresh = open_shards(f"file://{local}", str(cache))
    np.testing.assert_array_equal(read_all(fresh).moments_n2CHW, expected)


def test_a_cache_that_can_not_be_made_again_is_not_the_remotes_fault(local, tmp_path):
    cache = tmp_path / "mount" / "cache"
    shards = open_shards(f"file://{local}", str(cache))
    shutil.rmtree(cache.parent)
    cache.parent.write_text("the disk is gone")
    with pytest.raises((InputError, RunError), match="data.cache_dir=.*mount/cache") as error:
        shards.read([0], [0])
    assert "restore" not in str(error.value) and "network" not in str(error.value)


def test_a_copy_that_is_damaged_again_and_again_is_this_nodes_fault(local, tmp_path, monkeypatch):
    shards = open_shards(f"file://{local}", str(tmp_path / "cache"))
    real = remote.Cache.fetch

    def rotten(self, name, xxh64, size):
        path = real(self, name, xxh64, size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return path

    monkeypatch.setattr(remote.Cache, "fetch", rotten)
    with pytest.raises(RunError, match=f"the copy {tmp_path}/cache/.* was damaged on this node's disk, twice"):
        shards.read([1], [0])


class Refusing(fsspec.AbstractFileSystem):
    """A back-end whose other side answers with one error, in the words that such back-ends use."""

    protocol = "refusing"
    answer: Exception

    def cat_file(self, path, start=None, end=None, **_):
        raise Refusing.answer


class NoCredentialsError(Exception):
    """botocore's name for it."""


class ClientResponseError(Exception):
    """aiohttp's name for it."""

    def __init__(self, status, text):
        super().__init__(f"{status}, message={text!r}")
        self.status = status


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (PermissionError("Forbidden"), InputError, "may not be read .*check the credentials"),
        (ClientResponseError(403, "Forbidden"), InputError, "may not be read .*check the credentials"),
        (ClientResponseError(401, "Unauthorized"), InputError, "may not be read .*check the credentials"),
        (NoCredentialsError("Unable to locate credentials"), InputError, "may not be read .*check the credentials"),
        (
            OSError(errno.EINVAL, "The provided token is malformed or otherwise invalid."),
            InputError,
            "may not be read .*check the credentials",
        ),
        (FileNotFoundError("manifest.json"), InputError, "has no manifest.json"),
        (ClientResponseError(503, "Slow Down"), RunError, "5 attempts .*check the address and the network, and run"),
        (TimeoutError("no answer"), RunError, "5 attempts .*check the address and the network, and run"),
    ],
)
def test_what_the_other_side_answers_is_told_apart(tmp_path, answer, kind, said):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    Refusing.answer = answer
    with pytest.raises(kind, match=said):
        open_shards("refusing://host/data", str(tmp_path))


def test_an_address_of_one_file_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match="is the address of one file"):
        open_shards("https://host/manifest.json?X-Amz-Signature=1", str(tmp_path))
