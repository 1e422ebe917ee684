"""Keep a run as a record that anyone can play again: `python tools/make_record.py RUN records/NAME`.

Copies what `ldt verify` and a reader need, small text files alone, and writes their hashes. Of the environment it keeps
what a run was computed on and by what, not whose machine it was.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from program import run_tool

from ldt.commands.verify import HASHES, hash_file
from ldt.errors import InputError
from ldt.files import making
from ldt.log import read_jsonl

FILES = ("config.yaml", "environment.jsonl", "metrics.jsonl", "evaluations.jsonl")
KEPT = ("time", "command", "world_size", "hardware", "python", "ldt", "rng_version", "nodes", "git")
"""Of a line of environment.jsonl; the program of its command without its directory."""


def make_record(run: Path, record: Path) -> None:
    """Copy the files that are there; config and log must be."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise InputError(f"{run} has no {name}; give the run_dir of a training run")
    if record.exists():
        raise InputError(f"{record} exists; choose another name, as a record stays as it is")
    kept = [name for name in FILES if (run / name).is_file()]
    with making(record) as written:
        for name in kept:
            shutil.copyfile(run / name, written / name)
        if "environment.jsonl" in kept:
            attempts = [anonymous(line) for line in read_jsonl(run / "environment.jsonl")]
            (written / "environment.jsonl").write_text("".join(json.dumps(a) + "\n" for a in attempts))
        hashes = {name: hash_file(written / name) for name in kept}
        (written / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")


def anonymous(attempt: dict[str, Any]) -> dict[str, Any]:
    """What a line of environment.jsonl says of the run."""
    program, *words = attempt.get("command") or ["ldt"]
    return {key: attempt[key] for key in KEPT if key in attempt} | {"command": [Path(program).name, *words]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("record", type=Path)
    arguments = parser.parse_args()
    make_record(arguments.run, arguments.record)
    print(f"record: {arguments.record}")


if __name__ == "__main__":
    run_tool(main)
