"""Paths at which there can't be what they are to hold: below a file, a directory, a pipe, a device. Each command says
so in a sentence and leaves what is there."""

import os
import shutil
import stat
from pathlib import Path

import forked
import pytest
from run_data import make_autoencoder, make_images, shared_run
from tiny_detector import MeanOfGrey

from ldt.cli import main
from ldt.files import write_atomic

RUN, IMAGES, AUTOENCODER = "{run}", "{images}", "autoencoder={autoencoder}"
EVALUATE = ["evaluate", RUN, "evaluate.images=4", "evaluate.steps=1", "evaluate.block=4"]
ENCODE = ["encode", f"images.path={IMAGES}", AUTOENCODER, "images.size=32", "images.fit=pad", "threads=1"]
COMMANDS = {
    "sample, grid": ["sample", RUN, "images=4", "steps=1", "block=4", "output={place}"],
    "sample, npz": ["sample", RUN, "images=4", "steps=1", "block=4", "format=npz", "output={place}"],
    "evaluate, results": [*EVALUATE, "evaluate.cache_dir={root}/cache", "evaluate.output={place}"],
    "evaluate, cache": [*EVALUATE, "evaluate.cache_dir={place}"],
    "score": ["score", IMAGES, f"reference={IMAGES}", "cache_dir={root}/cache", "output={place}"],
    "score, cache": ["score", IMAGES, f"reference={IMAGES}", "cache_dir={place}", "output={root}/scores.jsonl"],
    "report": ["report", RUN, "output={place}"],
    "export": ["export", RUN, "to={place}"],
    "encode": [*ENCODE, "output={place}"],
    "inspect": ["inspect", "{root}/encoded", "grid={place}"],
}
DIRECTORIES = ("evaluate, cache", "score, cache", "encode")  # whose places are to be directories


def below_a_file(root: Path) -> Path:
    (root / "file").write_text("of before")
    return root / "file" / "below"


def a_directory(root: Path) -> Path:
    (root / "directory").mkdir()
    return root / "directory"


def a_pipe(root: Path) -> Path:
    os.mkfifo(root / "pipe")
    return root / "pipe"


def a_device(root: Path) -> Path:
    """As /dev/null is, which root can replace by a file, for the whole machine."""
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return root / "null"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("misplaced")
    shutil.copytree(shared_run(tmp_path_factory), root / "run")
    make_images(root / "images", 6)
    make_autoencoder(root / "autoencoder")
    known = {name: root / name for name in ("run", "images", "autoencoder")}
    words = [word.format(**known, root=root, place=root / "encoded") for word in COMMANDS["encode"]]
    assert main([*words, "--quiet"]) == 0
    return known | {"root": root}


@pytest.mark.parametrize("make", [below_a_file, a_directory, a_pipe, a_device])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_written_there(world, tmp_path, monkeypatch, capsys, name, make):
    if make is a_directory and name in DIRECTORIES:
        return
    for module in ("ldt.evaluation.sets", "ldt.commands.evaluate"):
        monkeypatch.setattr(f"{module}.make_detector", lambda *_: MeanOfGrey())
    place = make(tmp_path)
    before = {p: p.lstat().st_mode for p in tmp_path.iterdir()}
    code = main([*(word.format(**world, place=place) for word in COMMANDS[name]), "--quiet"])
    said = capsys.readouterr().err
    assert code == 2 and str(tmp_path) in said and said.count("\n") == 1, said
    assert {p: p.lstat().st_mode for p in tmp_path.iterdir()} == before


def test_a_run(tmp_path):
    place = below_a_file(tmp_path)
    for path in (place, place.parent):
        done = forked.run("-m", "ldt", "train", f"run_dir={path}", "data.path=x")
        assert done.returncode == 2 and str(path) in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["pipe", "pipe.tar", "pipe.npz"])
def test_images_that_would_never_come(world, tmp_path, capsys, name):
    """Of a pipe that nobody writes; a command that opened it would wait for ever."""
    os.mkfifo(tmp_path / name)
    words = [word.format(**world, place=tmp_path / "out") for word in COMMANDS["encode"]]
    assert main([*words, f"images.path={tmp_path}/{name}", "--quiet"]) == 2
    assert f"{tmp_path}/{name}" in capsys.readouterr().err


def test_an_image_that_would_never_come(world, tmp_path, capsys):
    shutil.copytree(world["images"], tmp_path / "images")
    pipe = next((tmp_path / "images").iterdir()) / "x.png"
    os.mkfifo(pipe)
    words = [word.format(**world, place=tmp_path / "out") for word in COMMANDS["encode"]]
    assert main([*words, f"images.path={tmp_path}/images", "--quiet"]) == 2
    assert f"image {pipe} can't be used (it is a pipe or a device)" in capsys.readouterr().err


def test_weights_that_would_never_come(world, tmp_path, capsys):
    os.mkfifo(tmp_path / "weights.pt")
    words = ["import", tmp_path / "weights.pt", f"to={tmp_path}/model", f"autoencoder={world['autoencoder']}"]
    assert main(list(map(str, words))) == 2
    assert f"{tmp_path}/weights.pt" in capsys.readouterr().err


def test_a_link_to_a_file_is_replaced_by_one(tmp_path):
    (tmp_path / "file").write_text("of before")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").read_bytes() == b"new" and (tmp_path / "file").read_text() == "of before"
