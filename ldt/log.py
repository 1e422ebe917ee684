"""Logging: lines for people, JSONL for programs, wandb behind them."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from ldt.errors import InputError
from ldt.files import natural, parse_json


def get_logger(name: str) -> logging.Logger:
    """A logger under `ldt`; only rank 0 speaks below WARNING."""
    return logging.getLogger(name if name.startswith("ldt") else f"ldt.{name}")


def configure(rank: int, quiet: bool = False) -> None:
    """Send the package's log lines to stderr: rank 0 from INFO on, others from WARNING on."""
    root = logging.getLogger("ldt")
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)
    root.propagate = False


def progress(total: int, unit: str, description: str, initial: int = 0, show: bool = True) -> tqdm:
    """A progress bar on stderr; silent where stderr is not a terminal or `show` is false."""
    hidden = not show or not sys.stderr.isatty() or not logging.getLogger("ldt").isEnabledFor(logging.INFO)
    return tqdm(
        total=total, initial=initial, unit=unit, desc=description, disable=hidden, dynamic_ncols=True, unit_scale=True
    )


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one object as one line, in a single write."""
    line = json.dumps(record, allow_nan=True, separators=(",", ":")) + "\n"
    with path.open("a") as f:
        f.write(line)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, in order. A torn last line (a killed writer) is left out, others are errors."""
    if not path.exists():
        return
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); check it") from None
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
            raise InputError(f"{path} line {i + 1} is not a JSON object: {line[:80]!r}; mend or remove that line")


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
        for record in cut:
            append_jsonl(path.with_suffix(".cut.jsonl"), record)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as f:
            f.writelines(json.dumps(r, separators=(",", ":")) + "\n" for r in kept)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    return len(cut)


class Wandb:
    """A mirror of metrics.jsonl in Weights & Biases; does nothing when not `enabled`.

    Online with a key (WANDB_API_KEY or ~/.netrc), else offline. The same run directory is the same wandb run after
    every restart. WANDB_MODE overrules.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], enabled: bool) -> None:
        self._run: Any = None
        if not enabled:
            return
        import wandb

        known = "WANDB_API_KEY" in os.environ or "wandb" in _read_text(Path("~/.netrc").expanduser())
        self._run = wandb.init(
            project="ldt",
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            name=run_dir.name,
            dir=run_dir,
            config=config,
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or ("online" if known else "offline"),  # type: ignore[arg-type]
        )
        self._run.define_metric("samples_seen")
        self._run.define_metric("*", step_metric="samples_seen")

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics."""
        if self._run is not None:
            self._run.log(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
