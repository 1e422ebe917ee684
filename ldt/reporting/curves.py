"""Curves of one or several runs: what both the page and the PNGs draw."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldt.reporting.history import History, Record, number

SCORE_NAME = re.compile(
    r"(?!.*_(std|error|hash|subsets|k|chance)$)"  # what goes with a score, but is none
    r"(fd|fid|sfid|kid|mmd_rbf|mind|is|inception_score|precision|recall|density|coverage|clip|caption_retrieval)(_\w+)?"
)
HIGHER_IS_BETTER = ("is", "inception_score", "precision", "recall", "density", "coverage", "clip", "caption_retrieval")
SETTINGS = (
    "images", "sampler", "steps", "guidance", "guidance_inner", "guide_scale",
    "weights", "labels", "shift", "precision", "seed", "size",
)  # fmt: skip
"""Evaluation keys that decide a score, in the order in which a legend names them."""
SETTINGS_UNNAMED = (
    "guidance_low", "guidance_high", "guide_hash", "block", "decode_slice",
    "detector_hash", "reference_hash", "captions_hash",
)  # fmt: skip
MOST_POINTS = 1200
SMOOTH_FROM = 200


@dataclass(frozen=True)
class Series:
    """One line: y over samples seen, hours and training compute (10¹⁵ floating-point operations).

    `style`: line, faint (behind a smoothed one) or points.

    `setting` is written at its end, where a run has several lines of the same colour.
    """

    run: int
    label: str
    style: str
    samples: list[float]
    hours: list[float]
    y: list[float]
    setting: str = ""
    compute: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A restart of a run: its place on each axis, and its label."""

    run: int
    samples: float
    hours: float
    text: str
    compute: float = math.nan


@dataclass(frozen=True)
class Chart:
    """A plot. `format`: number, percent, power (scientific). `from_zero`: whether its y axis starts at 0."""

    id: str
    title: str
    series: list[Series]
    format: str = "number"
    from_zero: bool = False
    caption: str = ""
    marks: list[Mark] = field(default_factory=list)


def make_charts(runs: Sequence[History]) -> list[Chart]:
    """All charts for which at least one run has data, scores first."""
    marks = [mark for k, run in enumerate(runs) for mark in restarts(k, run)]
    charts = [*_score_charts(runs), _loss_chart(runs)]
    charts += [
        _plain("grad_norm", "Gradient norm", runs, "before clipping"),
        _plain("lr", "Learning rate", runs, "", format="power", from_zero=True),
        _plain("images_per_second", "Images per second", runs, "all processes together", from_zero=True),
        _plain("data_wait_fraction", "Waiting for data", runs, "share of step time", "percent", from_zero=True),
    ]
    cost = [run.training_flops() / 1e15 for run in runs]
    marks = [replace(mark, compute=mark.samples * cost[mark.run]) for mark in marks]
    return [
        replace(
            chart,
            marks=marks,
            series=[replace(s, compute=[x * cost[s.run] for x in s.samples]) for s in chart.series],
        )
        for chart in charts
        if chart.series
    ]


def restarts(k: int, run: History) -> list[Mark]:
    """Where run number k went on in another process: the last clock reading of the attempt before."""
    marks = []
    for i in range(1, len(run.lines)):
        before, after = run.lines[i - 1], run.lines[i]
        if before.get("attempt") == after.get("attempt"):
            continue
        text = f"{run.name}: attempt {after.get('attempt')}"
        worlds = _world(run.lines[:i][::-1]), _world(run.lines[i:])
        if worlds[0] != worlds[1]:
            text += f", {worlds[0]} → {worlds[1]} processes"
        marks.append(Mark(k, before["samples_seen"], run.hours[i - 1], text))
    return marks


def score_names(runs: Sequence[History]) -> list[str]:
    """The metrics that any evaluation holds."""
    found = {key: None for run in runs for r in run.evaluations for key in r if SCORE_NAME.fullmatch(key)}
    return [key for key in found if any(math.isfinite(number(r, key)) for run in runs for r in run.evaluations)]


def higher_is_better(score: str) -> bool:
    """Whether a higher value of this score is better."""
    return score.startswith(HIGHER_IS_BETTER)


def evaluation_groups(run: History) -> dict[str, list[Record]]:
    """Evaluations that may be joined by a line: the same settings, detector and reference. Keyed by what differs."""

    def key(record: Record) -> str:
        return json.dumps([record.get(k) for k in (*SETTINGS, *SETTINGS_UNNAMED)], sort_keys=True, default=str)

    groups: dict[str, list[Record]] = {}
    for record in run.evaluations:
        groups.setdefault(key(record), []).append(record)
    firsts = [records[0] for records in groups.values()]
    telling = [k for k in SETTINGS if len({str(r.get(k)) for r in firsts}) > 1]
    named: dict[str, list[Record]] = {}
    for records in groups.values():
        label = ", ".join(_setting(k, records[0].get(k)) for k in telling)
        while label in named:
            label += "′"
        named[label] = records
    return named


def best_score(run: History, score: str) -> float:
    """The best of the comparable evaluations of most images; NaN if there are none."""
    values = [number(r, score) for r in of_most_images(run, score)]
    return (max if higher_is_better(score) else min)(values, default=math.nan)


def of_most_images(run: History, score: str) -> list[Record]:
    """Of the evaluations that hold this score, the group with the most images; among equals the newest group."""
    groups = [[r for r in g if math.isfinite(number(r, score))] for g in evaluation_groups(run).values()]
    return max(filter(None, groups), key=lambda g: (number(g[0], "images"), number(g[-1], "time")), default=[])


def unlike(runs: Sequence[History], score: str) -> list[str]:
    """The settings in which the runs' best scores were made differently, so that they don't compare."""
    firsts = [group[0] for run in runs if (group := of_most_images(run, score))]
    return [k for k in (*SETTINGS, *SETTINGS_UNNAMED) if len({str(r.get(k)) for r in firsts}) > 1]


def decimate(index_n: Sequence[int], y_n: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """At most `most` of the indices, with the least and the greatest y of each stretch among them."""
    if len(index_n) <= most:
        return list(index_n)
    stretches = most // 2
    kept: list[int] = []
    for s in range(stretches):
        part = range(len(index_n) * s // stretches, len(index_n) * (s + 1) // stretches)
        finite = [i for i in part if math.isfinite(y_n[i])] or [part[0]]
        ends = {min(finite, key=lambda i: y_n[i]), max(finite, key=lambda i: y_n[i])}
        kept += [index_n[i] for i in sorted(ends)]
    return kept


def smooth(y_n: Sequence[float], half: int) -> list[float]:
    """Centred mean over 2 half + 1 neighbours, fewer at the ends, of those that are finite."""
    totals, counts = [0.0], [0]
    for y in y_n:
        finite = math.isfinite(y)
        totals.append(totals[-1] + (y if finite else 0.0))
        counts.append(counts[-1] + finite)
    out = []
    for i in range(len(y_n)):
        reach = min(half, i, len(y_n) - 1 - i)
        low, high = i - reach, i + reach + 1
        seen = counts[high] - counts[low]
        out.append((totals[high] - totals[low]) / seen if seen else math.nan)
    return out


def _score_charts(runs: Sequence[History]) -> list[Chart]:
    charts = []
    for name in score_names(runs):
        series = []
        for k, run in enumerate(runs):
            for label, records in evaluation_groups(run).items():
                records = [r for r in records if math.isfinite(number(r, name))]
                if records:
                    samples = [number(r, "samples_seen") for r in records]
                    hours = [hours_at(run, s) for s in samples]
                    full = f"{run.name} · {label}" if label else run.name
                    y = [number(r, name) for r in records]
                    series.append(Series(k, full, "points", samples, hours, y, setting=label))
        caption = "higher is better" if higher_is_better(name) else "lower is better"
        charts.append(Chart(name, name, series, caption=caption))
    return charts


def hours_at(run: History, samples: float) -> float:
    """Running time when that many samples had been seen, between log lines by proportion; NaN without a log."""
    clock = [line["samples_seen"] for line in run.lines]
    if not clock or samples > clock[-1]:
        return math.nan
    i = next(i for i, c in enumerate(clock) if c >= samples)
    if i == 0 or clock[i] == samples:
        return run.hours[i]
    part = (samples - clock[i - 1]) / (clock[i] - clock[i - 1])
    return run.hours[i - 1] + part * (run.hours[i] - run.hours[i - 1])


def _loss_chart(runs: Sequence[History]) -> Chart:
    series = []
    for k, run in enumerate(runs):
        series += _line(k, run, "loss", run.steps, f"{run.name} · training", smoothed=True)
        held_out = _line(k, run, "validation_loss", run.validations, f"{run.name} · validation", smoothed=False)
        series += [Series(k, s.label, "points", s.samples, s.hours, s.y) for s in held_out]
    smoothed = " (smoothed)" if any(s.style == "faint" for s in series) else ""
    fixed = any(run.lines[i].get("validation_times") for run in runs for i in run.validations)
    other = " (the velocity's loss at fixed times, which are not those of training)" if fixed else ""
    two = any(run.config.get("model", {}).get("inner_head") for run in runs)
    inner = ", the inner head's loss included" if two else ""
    caption = f"line: training batches{smoothed}{inner}; dots: averaged weights on held-out images{other}"
    return Chart("loss", "Loss", series, caption=_sentence(caption, _not_finite(runs, "loss")))


def _plain(
    key: str, title: str, runs: Sequence[History], caption: str, format: str = "number", from_zero: bool = False
) -> Chart:
    series = [s for k, run in enumerate(runs) for s in _line(k, run, key, run.steps, run.name, smoothed=False)]
    return Chart(key, title, series, format, from_zero, _sentence(caption, _not_finite(runs, key)))


def _line(k: int, run: History, key: str, lines: list[int], label: str, smoothed: bool) -> list[Series]:
    """A curve, and the raw one faintly behind it where it is smoothed."""
    y_n = [number(run.lines[i], key) for i in lines]
    if not any(map(math.isfinite, y_n)):
        return []

    def series(style: str, y_n: Sequence[float]) -> Series:
        at = decimate(range(len(lines)), y_n)
        samples = [float(run.lines[lines[i]]["samples_seen"]) for i in at]
        return Series(k, label, style, samples, [run.hours[lines[i]] for i in at], [y_n[i] for i in at])

    if not smoothed or len(lines) < SMOOTH_FROM:
        return [series("line", y_n)]
    return [series("faint", y_n), series("line", smooth(y_n, max(2, len(lines) // 50)))]


def _sentence(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _not_finite(runs: Sequence[History], key: str) -> str:
    lost = sum(key in line and not math.isfinite(number(line, key)) for run in runs for line in run.lines)
    return f"{lost} values that are not finite are left out" if lost else ""


def _world(lines: Iterable[Record]) -> Any:
    return next((line["world_size"] for line in lines if "world_size" in line), "?")


def _setting(key: str, value: Any) -> str:
    words: dict[str, Callable[[Any], str]] = {
        "images": lambda v: f"{v} images",
        "sampler": str,
        "steps": lambda v: f"{v} steps",
        "weights": lambda v: f"{v} weights",
    }
    if value is None:  # it stands in a result only where it is in use
        return f"no {key}"
    return words.get(key, lambda v: f"{key} {v}")(value)
