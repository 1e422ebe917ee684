"""Logging: lines for people and JSONL for programs."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldt.errors import InputError, by_reason, on_one_line
from ldt.files import check_writable_place, naming, natural, parse_json, replacing
from ldt.progress import Handler, ProgressLine


def get_logger(name: str) -> logging.Logger:
    """A logger under `ldt`; only rank 0 speaks below WARNING."""
    return logging.getLogger(name if name.startswith("ldt") else f"ldt.{name}")


def configure(rank: int, quiet: bool = False) -> None:
    """Send the package's log lines to stderr: rank 0 from INFO on, others from WARNING on."""
    root = logging.getLogger("ldt")
    root.handlers.clear()
    handler = Handler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)
    root.propagate = False


class _OneLine(logging.Formatter):
    """A line a message, whatever names are in it; the tracebacks of our own mistakes follow below."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return on_one_line(super().formatMessage(record))


def progress(total: int, unit: str, what: str, done: int = 0, show: bool = True) -> ProgressLine:
    """A line of progress on stderr; none under `--quiet` or where `show` is false."""
    return ProgressLine(total, unit, what, done, show and logging.getLogger("ldt").isEnabledFor(logging.INFO))


def append_jsonl(path: Path, *records: dict[str, Any]) -> None:
    """Append objects as a line each: all of them, or none where the disk is full."""
    lines = "".join(json.dumps(record, allow_nan=True, separators=(",", ":")) + "\n" for record in records)
    left = memoryview(lines.encode())
    check_writable_place(path)
    with naming(path), path.open("ab", buffering=0) as f:
        start = f.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[f.write(left) :]
        except OSError:
            if f.seek(0, os.SEEK_END) == start + len(lines) - len(left):  # nobody else has appended meanwhile
                f.truncate(start)
            raise


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, in order. A torn last line (a killed writer) is left out, others are errors."""
    if not path.exists():
        return
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise by_reason(f"{path} can't be read ({error.strerror}); check it", error) from None
    for i, line in enumerate(lines):
        if not line:
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        elif i < len(lines) - 1:
            raise InputError(f"{path} line {i + 1} is not a JSON object: {line[:80]!r}; correct or remove that line")


def keep_jsonl_until(path: Path, key: str, limit: int) -> int:
    """Cut a JSONL file back to the records whose `key` is at most `limit`; returns how many were cut.

    What is cut goes to `<name>.cut` beside it, so nothing is lost.
    """
    records = list(read_jsonl(path))
    for record in records:
        if not natural(record.get(key)):
            raise InputError(f"{path} has a line without a number as {key}: {str(record)[:80]}; remove that line")
    kept = [r for r in records if r[key] <= limit]
    cut = [r for r in records if r[key] > limit]
    if path.exists():
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in kept))
            append_jsonl(path.with_suffix(".cut.jsonl"), *cut)  # what comes after it needs no room
    return len(cut)
