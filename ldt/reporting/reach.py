"""To reach a score: the samples, hours and training compute that it took, over the seeds of a config."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldt.config import flatten
from ldt.reporting.curves import higher_is_better, hours_at, of_most_images, score_names, unlike
from ldt.reporting.history import History, Record, number
from ldt.run.identity import identity

VALIDATION = "validation_loss"
ALSO_TELLING = ("train.total_samples", "data.path", "engine.precision")
"""Keys that may change at a restart, and yet make another arm of a comparison."""


@dataclass(frozen=True)
class Reach:
    """What the runs of one config took to reach a score, each until its first evaluation that had it.

    runs: their numbers; samples, hours, compute (10¹⁵ floating-point operations): of those that reached it.
    """

    score: str
    target: float
    runs: list[int]
    samples: list[float]
    hours: list[float]
    compute: list[float]


def reaches(runs: Sequence[History], targets: Mapping[str, float]) -> list[Reach]:
    """A row for each score and config.

    targets: by score; for others, where there are several runs, what all of them have reached.
    """
    names = [*score_names(runs), *([VALIDATION] if any(run.validations for run in runs) else [])]
    return [row for name in names if _compare(runs, name) for row in _rows(runs, name, targets.get(name))]


def by_config(runs: Sequence[History]) -> list[list[int]]:
    """The numbers of the runs whose configs differ in their seed alone; a run without a config stands for itself."""
    groups: dict[str, list[int]] = {}
    for k, run in enumerate(runs):
        flat = flatten(run.config)
        telling = identity(run.config) | {key: flat.get(key) for key in ALSO_TELLING}
        telling.pop("seed", None)
        groups.setdefault(json.dumps(telling, sort_keys=True, default=str) if flat else str(k), []).append(k)
    return list(groups.values())


def _rows(runs: Sequence[History], name: str, target: float | None) -> list[Reach]:
    points = [_points(run, name) for run in runs]
    if target is None:
        if len(runs) < 2 or not all(points):
            return []
        best = [min(_cost(name, value) for _, value in one) for one in points]
        target = _cost(name, max(best))  # its own inverse
    rows = []
    for group in by_config(runs):
        reached = [(k, first) for k in group if (first := _first(points[k], name, target)) is not None]
        compute = [samples * runs[k].training_flops() / 1e15 for k, samples in reached]
        hours = [hours_at(runs[k], samples) for k, samples in reached]
        rows.append(Reach(name, target, group, [samples for _, samples in reached], hours, compute))
    return rows


def _points(run: History, name: str) -> list[tuple[float, float]]:
    """(samples seen, value) in the order of the clock, of evaluations that compare."""
    records = [run.lines[i] for i in run.validations] if name == VALIDATION else of_most_images(run, name)
    points = sorted((number(r, "samples_seen"), number(r, name)) for r in records)
    return [(samples, value) for samples, value in points if math.isfinite(value)]


def _cost(name: str, value: float) -> float:
    """Less is better."""
    return -value if higher_is_better(name) else value


def _first(points: Sequence[tuple[float, float]], name: str, target: float) -> float | None:
    wanted = _cost(name, target)
    return next((samples for samples, value in points if _cost(name, value) <= wanted), None)


def _compare(runs: Sequence[History], name: str) -> bool:
    """Whether the runs' values are of one kind."""
    if name != VALIDATION:
        return not unlike(runs, name)
    kinds = {_validation_kind(run, line) for run in runs for line in (run.lines[i] for i in run.validations)}
    return len(kinds) == 1


def _validation_kind(run: History, line: Record) -> str:
    """Losses at the same fixed times compare; those at an objective's own times only within it.

    A network that learns guided velocities is further from the data's own.
    """
    times, objective = line.get("validation_times"), run.config.get("objective")
    if not times:
        return json.dumps(objective, sort_keys=True, default=str)
    guidance = objective.get("mean_flow_guidance", 1.0) if isinstance(objective, dict) else 1.0
    return f"{times} fixed times, guidance {guidance} inside"
