"""Run a command in several copies of this repository at the same time: two suites, two demos on one machine.

    python tools/at_once.py make test
    python tools/at_once.py --copies 3 pytest -q tests/test_launchers.py

A copy has the last commit and shares the environment in .venv. Each copy's output goes into a file of its own; the exit
code is 1 if any of them failed.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from program import run_tool

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Start all, wait for all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    flags = parser.parse_args(arguments)
    root, start = Path(tempfile.mkdtemp(prefix="ldt-at-once-")), time.monotonic()
    copies = [clone(root / f"copy-{i}") for i in range(flags.copies)]
    running = []
    for path in copies:
        environment = os.environ | {"PYTHONPATH": str(path), "PATH": f"{path}/.venv/bin:{os.environ['PATH']}"}
        with path.with_suffix(".log").open("w") as log:
            running.append(subprocess.Popen(flags.command, cwd=path, env=environment, stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    for path, code in zip(copies, codes, strict=True):
        print(f"code {code} after {time.monotonic() - start:.0f} s: {path.with_suffix('.log')}")
    return int(any(codes))


def clone(path: Path) -> Path:
    """A copy of the last commit, whose files look older than the environment, so that `make` leaves that as it is."""
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, path], check=True)
    (path / ".venv").symlink_to((ROOT / ".venv").resolve())
    for file in path.glob("**/*"):
        if file.is_file() and ".git" not in file.parts and ".venv" not in file.parts:
            os.utime(file, (0, 0))
    return path


if __name__ == "__main__":
    run_tool(main)
