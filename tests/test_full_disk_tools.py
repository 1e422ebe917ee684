"""The tools and submissions on a full disk: one sentence, what was there stays, and nothing is half-written under its
final name."""

import ast
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import at_once
import bench
import chaos
import emoji
import forked
import make_record
import program
import pytest
import reconstruct
import screenshots
from PIL import Image
from small_disk import FULL, SmallDisk, disk, fill, name_in
from train_autoencoder import make_autoencoder, replace_files

import records
from ldt.models.representation import EfficientNetRAE

__all__ = ["disk", "fill"]
ROOT = Path(__file__).parents[1]


def tool(main: Callable[..., Any], *words: object) -> int:
    """The exit code of a tool whose function `main` takes its arguments itself."""
    return process(lambda: main(*words))


def program_of(main: Callable[[], Any], *words: object) -> int:
    """The exit code of a tool that reads the command line."""
    sys.argv[1:] = map(str, words)
    return process(main)


def process(main: Callable[[], Any]) -> int:
    with pytest.raises(SystemExit) as end:
        program.run_tool(main)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool"])


@pytest.fixture
def run_dir(disk: SmallDisk) -> Path:
    """What records are made of: a config, a log that takes some pages, and where it was made."""
    path = disk.path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("seed: 1\n")
    lines = [json.dumps({"samples_seen": 8 * i, "loss": 1 / i, "words": "x" * 500}) for i in range(1, 20)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "environment.jsonl").write_text(json.dumps({"time": 1.8e9, "command": ["ldt"], "world_size": 1}) + "\n")
    return path


def test_a_record(fill, disk, run_dir):
    """Half a record would have been one that can't be verified, and in the way of the next attempt."""
    fill(["record"], program_of, make_record.main, run_dir, disk.path / "record")


def test_the_table_of_records(fill, disk, run_dir):
    page = disk.path / "README.md"
    page.write_text(f"{records.BEGIN}\n{records.END}\n" + "of before\n" * 2000)
    fill(["README.md"], tool, records.main, ["--records", str(ROOT / "records"), "--page", str(page)])


def test_the_results_of_a_benchmark(fill, disk):
    small = ["--images", 40, "--shards", 2]
    fill(["result.json"], program_of, bench.main, "index", *small, "--json", disk.path / "result.json")


@dataclass
class Round:
    fault: str


def test_the_rounds_of_a_campaign(fill, disk):
    def main() -> int:
        return chaos.command("", ["none"], lambda root, faults, seed: [Round("x" * 9000)], "all well")

    fill(["rounds.json"], program_of, main, "--json", disk.path / "rounds.json")


def test_reconstructed_images(fill, disk):
    fill(["images.npz"], tool, reconstruct.main, "embedded:fashion_mnist", disk.path / "images.npz", 9)


def test_an_autoencoder_that_is_trained_again(fill, disk):
    model = make_autoencoder(1)
    replace_files(disk.path / "model", model.save_pretrained)
    fill(["model"], tool, replace_files, disk.path / "model", lambda path: model.save_pretrained(path))


def test_a_representation_autoencoder_that_is_trained_again(fill, disk):
    model = EfficientNetRAE()
    replace_files(disk.path / "model", model.save)
    fill(["model"], tool, replace_files, disk.path / "model", model.save)


def test_captioned_images(fill, disk, tmp_path):
    package = tmp_path / "package.tgz"
    kinds = [("1f600", "Smileys & Emotion"), ("1f436", "Animals & Nature")]
    listed = [{"image": f"{k}.png", "has_img_google": True, "category": c, "name": k} for k, c in kinds]
    with tarfile.open(package, "w:gz") as archive:
        picture = io.BytesIO()
        Image.new("RGBA", (64, 64), "red").save(picture, "png")
        pictures = [(f"img/google/64/{k}.png", picture.getvalue()) for k, _ in kinds]
        for name, content in [("emoji.json", json.dumps(listed).encode()), *pictures]:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def main() -> None:
        emoji.main()
        assert len(list((disk.path / "emoji").rglob("*.txt"))) == 2

    fill(["emoji"], program_of, main, package, disk.path / "emoji")


def test_a_picture_of_a_page(disk, tmp_path, capsys):
    (tmp_path / "page.html").write_text("<!doctype html><title>page</title><p>words")
    words = [tmp_path / "page.html", disk.path, "--views", "phone"]
    disk.leave(0)
    assert program_of(screenshots.main, *words) == 1
    assert "page-phone.png could not be written" in capsys.readouterr().err and not disk.files()


def test_copies_of_the_repository(disk, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(disk.path))
    disk.leave(0)
    assert tool(at_once.main, ["--copies", "1", "true"]) == 1
    said = capfd.readouterr().err
    assert FULL in said and "ended with 128; it has said why" in said and "Traceback" not in said


def test_a_submission(disk, tmp_path):
    """submitit's files; the job is not started, and the same command starts it once there is room."""
    run = [f"run_dir={tmp_path}/run", "data.path=/nowhere", "cluster=local", f"logs={disk.path}/logs"]
    disk.leave(0)
    done = forked.run("tools/submit.py", *run, cwd=ROOT)
    assert done.returncode == 1 and name_in(done.stderr, disk) == "logs" and done.stderr.count("\n") == 1
    disk.make_room()
    line = forked.run("tools/submit.py", *run, cwd=ROOT).stdout
    log = disk.path / "logs" / f"{line.split()[1].rstrip(':')}_0_log.err"
    end = time.monotonic() + 120
    while not (log.exists() and "/nowhere" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("program", sorted(p.name for p in (ROOT / "tools").glob("*.py")))
def test_nothing_is_written_in_place(program):
    """Each place in a tool that writes a file by itself, and why that is not a result under its final name."""
    tree = ast.parse((ROOT / "tools" / program).read_text())
    assert set(writers(tree)) == IN_PLACE.get(program, set())


IN_PLACE = {
    "at_once.py": {"main"},  # the output of a process
    "bench_checkpoint.py": {"plain_write", "repetition"},  # what is measured
    "bench_data.py": {"_streaming"},  # what follows is in temporary directories
    "bench_encode.py": {"_write_images"},
    "bench_index.py": {"_write_tars", "_write_zips", "_write_folder"},
    "bench_train.py": {"forget_peak"},  # a switch of the system
    "chaos.py": {"spoil_cache"},
    "chaos_encode.py": {"write_image"},
    "emoji.py": {"_write"},  # what follows is in directories that take their names when whole
    "make_compat.py": {"main", "write_images"},
    "make_fashion_mnist.py": {"main"},  # in `replacing`
    "make_record.py": {"make_record"},
    "shard_data.py": {"write_shards"},
    "simulate_data.py": {"start"},
    "train_autoencoder.py": {"main"},
}
METHODS = {"write_text", "write_bytes", "save", "save_pretrained", "writestr", "copyfile", "copytree", "copy", "dump"}


def writers(tree: ast.Module) -> Iterator[str]:
    """Names of functions with a call that writes a file, other than by those of `ldt.files` and `ldt.image_files`."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    mode = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    opened = call.func.attr == "open" and any(m and set(m) <= set("wxab+") for m in mode)
                    if opened or call.func.attr in METHODS:
                        yield function.name
