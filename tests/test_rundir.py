"""What a start notes in the run directory, with a real git repository around a copy of the source."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldt.run import directory, provenance


def git(directory: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(
        ["git", *who, "-C", str(directory), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A repository with one annotated tag, and in it an `ldt/run/provenance.py` that takes itself for the source."""
    package = tmp_path / "source" / "ldt"
    package.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    git(package.parent, "init", "--quiet")
    git(package, "add", ".")
    git(package, "commit", "--quiet", "--message=x")
    git(package, "tag", "--annotate", "v1", "--message=x")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    return package


def newest(run_dir: Path) -> dict:
    return json.loads((run_dir / "environment.jsonl").read_text().splitlines()[-1])


def test_the_commit_is_noted_whatever_its_tags_and_what_was_edited_though_it_is_no_utf8(source, tmp_path):
    commit = git(source, "rev-parse", "HEAD")
    assert directory.prepare(tmp_path / "run", "seed: 1\n", 1) == 0
    assert newest(tmp_path / "run")["git"] == commit
    with (source / "provenance.py").open("ab") as f:
        f.write(b"# caf\xe9\n")
    assert directory.prepare(tmp_path / "run", "seed: 1\n", 1) == 1
    assert newest(tmp_path / "run")["git"] == f"{commit}-dirty"
    assert "+# caf" in (tmp_path / "run" / "source.diff").read_text()


def test_an_installed_package_in_somebodys_repository_is_not_that_repository(source, tmp_path, monkeypatch):
    installed = shutil.copytree(source, source.parent / "site-packages" / "ldt")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    directory.prepare(tmp_path / "run", "seed: 1\n", 1)
    assert newest(tmp_path / "run")["git"] is None and (tmp_path / "run" / "source.diff").read_text() == ""


def test_a_line_that_a_killed_start_tore_does_not_swallow_the_next_one(tmp_path):
    for attempt in range(3):
        assert directory.prepare(tmp_path, "seed: 1\n", 1) == attempt
        with (tmp_path / "environment.jsonl").open("a") as f:
            f.write('{"time": 1, "com')


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path):
    """In a process of its own, whose files can't grow: an empty config.yaml would mean the defaults."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from ldt.errors import in_a_sentence; from ldt.run import directory\n"
        "directory.prepare(Path(sys.argv[1]), 'seed: 1\\n', 1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        "with in_a_sentence(): directory.prepare(Path(sys.argv[1]), 'seed: 2\\n', 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "RunError: the disk" in done.stderr, "which may have room again: not a mistake in the input"
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
