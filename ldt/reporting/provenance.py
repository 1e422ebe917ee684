"""The page's small print: configs and their differences, scores with their settings, attempts, hashes and versions."""

from collections.abc import Sequence
from typing import Any

import yaml

from ldt.config import flatten
from ldt.reporting.curves import SETTINGS, score_names
from ldt.reporting.history import History, Record, number
from ldt.reporting.html import Markup, join, pairs, table, tag
from ldt.reporting.summary import count, date, score

COLOURS = 8
"""Runs have as many colours (page.css); the next ones share."""


def swatch(k: int) -> Markup:
    """The colour of run number k."""
    return tag("span", tag("span", class_="swatch"), class_=f"r{k % COLOURS}")


def pill(run: History) -> Markup:
    """How the run ended, in one word."""
    word = str(run.outcome.get("outcome", "unknown"))
    known = word if word in ("done", "failed", "wrong_input", "stopped", "running") else ""
    return tag("span", word.replace("_", " "), class_=f"pill {known}".strip())


def configs(runs: Sequence[History]) -> Markup:
    """Keys in which the runs differ, and each whole config folded away."""
    parts = [tag("h2", "Config"), _differences(runs) if len(runs) > 1 else Markup("")]
    for run in runs:
        words = "The whole config" + (f" of {run.name}" if len(runs) > 1 else "")
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(tag("details", tag("summary", words), tag("pre", text)))
    return tag("section", *parts)


def _differences(runs: Sequence[History]) -> Markup:
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differing = [key for key in keys if len({repr(one.get(key, "–")) for one in flat}) > 1]
    if not differing:
        return tag("p", "The runs have equal configs.", class_="note")
    head = ["key", *(join([swatch(k), run.name]) for k, run in enumerate(runs))]
    rows = [[tag("code", key), *(tag("code", one.get(key, "–")) for one in flat)] for key in differing]
    return tag("div", table(head, rows), class_="card")


def provenance(run: History, runs: int) -> Markup:
    """The section on where the numbers came from: data, weights, scores and attempts."""
    title = "Provenance" + (f" · {run.name}" if runs > 1 else "")
    parts = [tag("h2", title), tag("div", pairs(_origin(run)), class_="card")]
    if run.evaluations:
        parts += [tag("h3", "Scores"), tag("div", _scores(run), class_="card")]
    if run.attempts:
        head = ["started", "processes", "hardware", "host", "job", "Python", "ldt", "source", "command"]
        rows = [_attempt_row(attempt) for attempt in run.attempts]
        parts += [tag("h3", f"Attempts ({len(rows)})"), tag("div", table(head, rows), class_="card")]
    return tag("section", *parts)


def _origin(run: History) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = [
        ("run directory", tag("code", run.path)),
        ("outcome", join([pill(run), " ", run.outcome.get("message", "")])),
    ]
    if run.checkpoint is None:
        return items
    manifest = run.checkpoint.manifest
    progress, written = manifest.get("progress", {}), manifest.get("written_by", {})
    spec = manifest.get("sampling", {})
    where = f"world {written.get('world_size')} at ZeRO stage {written.get('zero_stage')}"
    versions = ", ".join(f"{k} {v}" for k, v in written.items() if k not in ("time", "world_size", "zero_stage"))
    encoder = [spec.get("autoencoder", "–"), ", weights ", tag("code", spec.get("autoencoder_hash", "–"))]
    skipped = progress.get("skipped")
    return items + [
        (
            "newest checkpoint",
            f"{count(run.checkpoint_samples)} samples seen, {date(number(written, 'time'))}, {where}",
        ),
        ("checkpoint hash", tag("code", run.checkpoint.hash)),
        ("data fingerprint", tag("code", progress.get("data_fingerprint", "–"))),
        ("autoencoder", join(encoder)),
        ("random numbers", f"version {manifest.get('rng_version')}, seed {run.config.get('seed', '–')}"),
        ("samples skipped", count(len(skipped)) if skipped else ""),
        ("versions", versions),
    ]


def _attempt_row(attempt: Record) -> list[Any]:
    return [
        date(number(attempt, "time")),
        *(_or_dash(attempt.get(key)) for key in ("world_size", "hardware", "host", "job", "python", "ldt")),
        tag("code", _git(attempt.get("git"))),
        tag("code", _command(attempt.get("command"))),
    ]


def _or_dash(value: Any) -> Any:
    return "–" if value in (None, "") else value


def _git(state: Any) -> str:
    """A commit in ten digits and whether the tree was edited."""
    commit, _, edited = str(state or "–").partition("-")
    return f"{commit[:10]} {edited}".strip()


def _command(command: Any) -> str:
    """A command line as one would type it, without what a launcher added."""
    if not isinstance(command, list) or not command:
        return str(command or "–")
    words = [str(word) for word in command[1:] if not str(word).startswith("--local_rank")]
    return " ".join(["ldt", *words])


def _scores(run: History) -> Markup:
    """Every evaluation with its settings."""
    names = score_names([run])
    settings = [key for key in SETTINGS if any(key in r for r in run.evaluations)]
    head = ["samples seen", *names, *settings, "detector", "checkpoint", "reference", "processes", "device", "when"]
    return table(head, [_score_row(r, names, settings) for r in run.evaluations])


def _score_row(record: Record, names: Sequence[str], settings: Sequence[str]) -> list[Any]:
    few = " (few images)" if record.get("rank_deficient") else ""
    hashes = [tag("code", str(record.get(key, "–"))[:12]) for key in ("checkpoint_hash", "reference_hash")]
    return [
        count(number(record, "samples_seen")),
        *(score(number(record, name)) + few for name in names),
        *(_or_dash(record.get(key)) for key in settings),
        tag("code", f"{record.get('detector', '–')} {str(record.get('detector_hash', ''))[:8]}"),
        *hashes,
        _or_dash(record.get("world_size")),
        _or_dash(record.get("device")),
        date(number(record, "time")),
    ]
