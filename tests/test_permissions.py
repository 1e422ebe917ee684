"""What a user who is not root meets: each file and directory that may not be read or written is named in a sentence."""

import contextlib
import encodings.cp437  # noqa: F401
import io
import os

import fsspec  # noqa: F401  (what is imported before the fork need not be readable for `nobody`)
import numpy as np
import pytest
import webdataset  # noqa: F401
from PIL import Image
from run_data import make_autoencoder
from shard_data import write_shards
from unprivileged import as_nobody

from ldt import cli
from ldt.commands import encode, evaluate, export, inspect, report, sample, status, train  # noqa: F401
from ldt.data.images import open_images
from ldt.data.shards import open_shards
from ldt.errors import InputError
from ldt.run import directory


def outcome(*arguments):
    """Exit code and last line of a command."""
    if arguments[0] == "train":  # its guard is a process of its own, of a Python that `nobody` may not run
        arguments = (*arguments, "engine.stall_seconds=0")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main([*map(str, arguments), "--quiet"])
    return code, said.getvalue().strip().split("\n")[-1]


@pytest.fixture
def data(public_path):
    for i in range(6):
        (public_path / "images" / "ant").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), i, np.uint8)).save(public_path / "images" / "ant" / f"{i}.png")
        (public_path / "images" / "ant" / f"{i}.txt").write_text("words")
    for i in range(6):
        (public_path / "latents").mkdir(exist_ok=True)
        moments = np.random.default_rng(i).standard_normal((8, 8, 8)).astype(np.float32)
        np.savez(public_path / "latents" / f"{i}.npz", moments=moments, label=0)
    os.system(f"tar -C {public_path}/images -cf {public_path}/images.tar .")
    make_autoencoder(public_path / "vae")
    for format in ("tar", "mds"):
        write_shards(public_path / format, [5, 6], format)
    for path in public_path.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o644)
    return public_path


ENCODE = ["images.size=32", "validation_fraction=0", "threads=1"]


@pytest.mark.parametrize(
    ("forbidden", "command", "named"),
    [
        ("images", ["encode", "images.path={}/images"], "images"),
        ("images/ant", ["encode", "images.path={}/images"], "images/ant"),
        ("images/ant/3.png", ["encode", "images.path={}/images"], "images/ant/3.png"),
        ("images/ant/3.txt", ["encode", "images.path={}/images", "text.encoder=bytes"], "images/ant/3.txt"),
        ("images.tar", ["encode", "images.path={}/images.tar"], "images.tar"),
        ("latents", ["encode", "latents={}/latents"], "latents"),
        ("latents/3.npz", ["encode", "latents={}/latents"], "latents/3.npz"),
        ("vae/config.json", ["encode", "images.path={}/images"], "vae"),
        ("tar", ["inspect", "{}/tar"], "tar"),
        ("tar/manifest.json", ["inspect", "{}/tar"], "tar/manifest.json"),
        ("tar/shards.npy", ["inspect", "{}/tar"], "tar/shards.npy"),
        ("tar/shard-00000001.tar", ["inspect", "{}/tar"], "shard-00000001.tar"),
        ("mds/shard-00000001.mds", ["inspect", "{}/mds"], "shard-00000001.mds"),
        ("tar/shard-00000001.tar", ["encode", "index={}/tar"], "shard-00000001.tar"),
        ("mds/shard-00000001.mds", ["encode", "index={}/mds"], "shard-00000001.mds"),
        ("tar", ["encode", "index={}/tar"], "tar"),
        ("tar", ["train", "data.path={}/tar", "run_dir={}/run"], "tar"),
        ("tar/manifest.json", ["train", "data.path={}/tar", "run_dir={}/run"], "tar/manifest.json"),
    ],
)
def test_what_may_not_be_read_is_named(data, forbidden, command, named):
    arguments = [a.format(data, data) for a in command]
    if command[0] == "encode":
        arguments += [f"autoencoder={data}/vae"] + ([] if "index=" in command[1] else [*ENCODE, f"output={data}/out"])
    (data / forbidden).chmod(0o0)
    code, said = as_nobody(lambda: outcome(*arguments))
    assert code == (1 if command[0] == "inspect" and "damaged" in said else 2), said
    assert named in said and "ermission" in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "images.path={}/images", "output={}/shut/out"],
        ["encode", "index={}/tar"],
        ["train", "data.path={}/tar", "run_dir={}/shut/run"],
        ["train", "data.path=file://{}/tar", "data.cache_dir={}/shut/cache", "run_dir={}/run"],
    ],
)
def test_where_may_not_be_written_is_named(data, command):
    (data / "shut").mkdir()
    for path in (data / "shut", data / "tar"):
        path.chmod(0o555)
    arguments = [a.format(data) for a in command] + ([f"autoencoder={data}/vae"] if command[0] == "encode" else [])
    code, said = as_nobody(lambda: outcome(*arguments, *(ENCODE if "images" in command[1] else [])))
    assert code == 2 and ("shut" in said or f"{data}/tar" in said) and "ermission" in said, said


def test_two_users_share_a_run_directory(data):
    """One goes on where the other stopped: every file is replaced, none is opened in place, and a refusal is whole."""
    run_dir = data / "run"
    run_dir.mkdir()
    run_dir.chmod(0o777)
    before = os.umask(0o077)
    try:
        assert directory.prepare(run_dir, "seed: 1\n", 1) == 0
    finally:
        os.umask(before)
    for path in run_dir.iterdir():
        path.chmod(0o644)
    assert as_nobody(lambda: directory.prepare(run_dir, "seed: 2\n", 1)) == 1
    assert (run_dir / "config.yaml").read_text() == "seed: 2\n" and (run_dir / "source.diff").exists()

    def refused() -> str:
        try:
            directory.prepare(run_dir, "seed: 3\n", 1)
        except InputError as error:
            return str(error)
        return ""

    run_dir.chmod(0o555)
    assert "can't be written (Permission denied)" in as_nobody(refused)
    assert (run_dir / "config.yaml").read_text() == "seed: 2\n"


def test_two_users_share_a_cache(data):
    """Files, locks and evictions of the one are no hindrance for the other."""
    cache = data / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    before = os.umask(0o077)  # the first user's habit
    try:
        first = open_shards(f"file://{data}/tar", str(cache))
        first.read([0], [0])
    finally:
        os.umask(before)

    def second():
        size = int(first.manifest.table["bytes"].max())
        shards = open_shards(f"file://{data}/tar", str(cache), 1.5 * size / 1e9)
        return [shards.read([k], [0]).label_n.tolist() for k in (0, 1)]

    assert as_nobody(second) == [first.read([k], [0]).label_n.tolist() for k in (0, 1)]
    assert len([p for p in cache.iterdir() if p.is_file()]) >= 1


def test_a_file_of_another_user_that_may_not_be_read_is_not_the_networks_fault(data):
    cache = data / "cache"
    path = open_shards(f"file://{data}/tar", str(cache)).fetch(0)
    path.chmod(0o600)
    (cache / "locks").chmod(0o777)

    def second():
        try:
            open_shards(f"file://{data}/tar", str(cache)).read([0], [0])
        except InputError as error:
            return str(error)

    said = as_nobody(second)
    assert "ermission" in said and str(cache) in said and "network" not in said, said


def test_images_that_may_be_read_are(data):
    assert as_nobody(lambda: len(open_images(f"{data}/images"))) == 6
