"""What the files of a run directory tell, read so that a missing or damaged piece becomes a note, not a failure."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import Damaged, listed
from ldt.config import from_dict
from ldt.diffusion.mean_flow import forward_passes
from ldt.errors import InputError
from ldt.files import parse_json, real
from ldt.nn.config import ModelConfig
from ldt.nn.sizes import flops

Record = dict[str, Any]
GRID_NAME = re.compile(r"\d+\.png")
SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class History:
    """The history of a run, read from its files.

    steps, validation: lines of metrics.jsonl with a training and with a validation loss, in the order of samples seen.
    hours: of each line of `lines`, running time until then (see `running_hours`). grids: (samples seen, picture).
    notes: sentences about what is missing or damaged.
    """

    path: Path
    name: str
    config: Record
    attempts: list[Record]
    outcome: Record
    lines: list[Record]
    hours: list[float]
    evaluations: list[Record]
    grids: list[tuple[int, Path]]
    checkpoint: Checkpoint | None
    notes: list[str]

    @property
    def steps(self) -> list[int]:
        """Indices of the lines about training steps."""
        return [i for i, line in enumerate(self.lines) if "loss" in line]

    @property
    def validations(self) -> list[int]:
        """Indices of the lines about the held-out split."""
        return [i for i, line in enumerate(self.lines) if "validation_loss" in line]

    def training_flops(self) -> float:
        """Floating-point operations that one training sample costs; NaN without a checkpoint.

        Three forward passes, and those that a mean flow needs besides.
        """
        if self.checkpoint is None:
            return math.nan
        try:
            spec = self.checkpoint.spec
            model = from_dict(ModelConfig, self.checkpoint.config["model"])
        except InputError:
            return math.nan
        objective = self.checkpoint.config["objective"]
        more = forward_passes(objective.get("mean_flow", 0.0), objective.get("mean_flow_guidance", 1.0))
        return (3.0 + more) * spec.average(lambda shape: flops(model, shape, spec.text_shape, spec.token))

    @property
    def samples_seen(self) -> int:
        """The last clock reading in the log, else the checkpoint's."""
        if self.lines:
            return int(self.lines[-1]["samples_seen"])
        return self.checkpoint_samples

    @property
    def checkpoint_samples(self) -> int:
        """The newest checkpoint's clock; 0 without one."""
        return self.checkpoint.samples_seen if self.checkpoint else 0


def read_history(path: Path, name: str) -> History:
    """Read a run directory; `InputError` if the path is not one."""
    if not path.is_dir():
        raise InputError(f"run {path} does not exist; give a directory that `ldt train` wrote (its run_dir)")
    if not any((path / file).exists() for file in ("config.yaml", "metrics.jsonl")):
        raise InputError(f"{path} is not a run: it has neither config.yaml nor metrics.jsonl; give the run_dir of one")
    notes: list[str] = []
    attempts = _read_lines(path / "environment.jsonl", notes, ("time",))
    lines = _surviving(_read_lines(path / "metrics.jsonl", notes, ("samples_seen",)))
    evaluations = _read_lines(path / "evaluations.jsonl", notes, ("samples_seen",))
    if not lines:
        notes.append("metrics.jsonl has no lines yet, so there are no training curves.")
    if not evaluations:
        notes.append(f"No checkpoint has been scored yet: ldt evaluate {path}")
    grids = sorted(
        (int(p.stem), p) for p in path.glob("samples/*.png") if GRID_NAME.fullmatch(p.name) and len(p.stem) < 19
    )
    if not grids:
        notes.append("No sample grids were drawn during training; log.samples_every_samples turns them on.")
    return History(
        path=path,
        name=name,
        config=_read_mapping(path / "config.yaml", notes),
        attempts=attempts,
        outcome=_read_mapping(path / "outcome.json", notes),
        lines=lines,
        hours=running_hours(lines, [number(a, "time") for a in attempts]),
        evaluations=sorted(evaluations, key=lambda r: number(r, "samples_seen")),
        grids=grids,
        checkpoint=_read_checkpoint(path, notes),
        notes=notes,
    )


def number(record: Record, key: str) -> float:
    """A number of a record as a float; NaN if it is missing or not finite."""
    value = record.get(key)
    return float(value) if real(value) else math.nan


def running_hours(lines: list[Record], starts: list[float]) -> list[float]:
    """Hours a run had been running when each line was written.

    Start-up counts; the time between attempts does not, nor does work that was lost to a kill: the clock of an attempt
    starts at its line in environment.jsonl (`starts`, in seconds).
    """
    hours, elapsed, before = [], 0.0, -math.inf
    for line in lines:
        now = number(line, "time")
        since = max([before, *(s for s in starts if s <= now)])
        if math.isfinite(now):
            elapsed += max(now - since, 0.0) if math.isfinite(since) else 0.0
            before = now
        hours.append(elapsed / SECONDS_AN_HOUR)
    return hours


def _surviving(lines: list[Record]) -> list[Record]:
    """Lines in the order of the clock: where it was set back, what came after that point was lost with its weights."""
    kept: list[Record] = []
    for line in lines:
        while kept and kept[-1]["samples_seen"] > line["samples_seen"]:
            kept.pop()
        kept.append(line)
    return kept


def _read_lines(path: Path, notes: list[str], numbers: tuple[str, ...]) -> list[Record]:
    """The objects of a JSONL file that hold these numbers; damaged lines are left out and noted."""
    if not path.exists():
        return []
    try:
        texts = path.read_text(errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{path.name} can't be read ({error.strerror}).")
        return []
    records, damaged = [], []
    for i, text in enumerate(texts):
        if not text.strip():
            continue
        try:
            record = parse_json(text)
        except ValueError:
            record = None
        if isinstance(record, dict) and all(math.isfinite(number(record, key)) for key in numbers):
            records.append(record)
        elif i == len(texts) - 1:
            notes.append(f"The last line of {path.name} is torn (its writer was killed) and left out.")
        else:
            damaged.append(i + 1)
    if damaged:
        notes.append(f"{path.name}: {len(damaged)} damaged lines left out, the first is line {damaged[0]}.")
    return records


def _read_mapping(path: Path, notes: list[str]) -> Record:
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError:
        notes.append(f"{path.name} is missing.")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{path.name} is damaged and left out.")
        return {}
    return content if isinstance(content, dict) else {}


def _read_checkpoint(path: Path, notes: list[str]) -> Checkpoint | None:
    """The newest checkpoint whose manifest is whole."""
    for directory in reversed(listed(path / "checkpoints")):
        try:
            return Checkpoint.read(directory)
        except (Damaged, InputError, OSError) as error:
            notes.append(f"Checkpoint {directory.name} is left out: {error}.")
    notes.append("There is no checkpoint yet.")
    return None
