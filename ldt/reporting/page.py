"""The report's page: one HTML file with everything in it, that asks nobody for anything."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from ldt import __version__
from ldt.config import flatten
from ldt.reporting.curves import Chart, higher_is_better, score_names
from ldt.reporting.history import History, number
from ldt.reporting.html import Markup, content_hash, join, pairs, script_json, table, tag
from ldt.reporting.pictures import NEIGHBOURS, THUMBNAIL, Neighbours, data_uri
from ldt.reporting.words import count, data_words, date, duration, model_words, of_scores, outcome_words, score
from ldt.pictures import to_pil

CRISP_BELOW = 64
"""Images of fewer pixels a side are shown with sharp pixels."""


@dataclass(frozen=True)
class Frame:
    """A sample grid as the slider shows it."""

    samples: int
    source: str


@dataclass(frozen=True)
class Gallery:
    """The pictures of a run: frames through training, real images in the same layout, and the memorisation check.

    rows: the class of each row of a grid, where rows are classes. notes: what could not be shown, and why.
    """

    frames: list[Frame]
    frames_of: int
    rows: list[str]
    real: str
    real_from: str
    image_size: int
    neighbours: Neighbours | None
    notes: list[str]


def make_page(runs: Sequence[History], charts: Sequence[Chart], galleries: Sequence[Gallery], plots: str) -> str:
    """The whole document. `plots`: where the PNGs of the charts are, relative to the page."""
    assets = importlib.resources.files("ldt") / "assets" / "report"
    style, script = (assets / "page.css").read_text(), (assets / "page.js").read_text()
    policy = f"default-src 'none'; img-src data:; style-src {content_hash(style)}; script-src {content_hash(script)}"
    data = {"charts": [asdict(c) for c in charts], "grids": [[asdict(f) for f in g.frames] for g in galleries]}
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{', '.join(r.name for r in runs)} · ldt report"),
        tag("style", Markup(style)),
    ]
    body = [
        _header(runs),
        *(_samples(k, run, gallery, len(runs)) for k, (run, gallery) in enumerate(zip(runs, galleries, strict=True))),
        _curves(runs, charts, plots),
        *(_memorisation(run, g.neighbours, g.image_size, len(runs)) for run, g in zip(runs, galleries, strict=True)),
        _configs(runs),
        *(_provenance(run, len(runs)) for run in runs),
        tag("footer", f"Made by ldt {__version__} on {date(datetime.now(UTC).timestamp())}. The page holds everything "
            "it shows and loads nothing."),
    ]  # fmt: skip
    scripts = [
        tag("script", script_json(data), type="application/json", id="data"),
        tag("script", Markup(script)),
    ]
    document = tag("html", tag("head", *head), tag("body", tag("main", *body), *scripts), lang="en")
    return f"<!doctype html>\n{document}\n"


# ------------------------------------------------------------------------------------------------------------- header


def _header(runs: Sequence[History]) -> Markup:
    if len(runs) == 1:
        run = runs[0]
        summary = [
            tag("p", join([model_words(run), " ", data_words(run), " ", outcome_words(run), " ", _pill(run)]),
                class_="lead"),
            tag("div", *(tag("div", tag("b", value), tag("span", name), class_="tile") for name, value in _facts(run)),
                class_="tiles"),
        ]  # fmt: skip
    else:
        names = list(dict.fromkeys(name for run in runs for name, _ in _facts(run)))
        rows = []
        for k, run in enumerate(runs):
            facts = dict(_facts(run))
            rows.append([join([_swatch(k), run.name, " ", _pill(run)]), *(facts.get(n, "–") for n in names)])
        summary = [tag("div", table(["run", *names], rows), class_="card")]
    notes = [
        tag("p", f"{run.name}: {note}" if len(runs) > 1 else note) for run in runs for note in run.notes
    ]
    return tag(
        "header",
        tag("p", "ldt · training report", class_="overline"),
        tag("h1", " · ".join(r.name for r in runs) if len(runs) < 4 else f"{len(runs)} runs"),
        *summary,
        tag("div", *notes, class_="notes") if notes else "",
    )


def _facts(run: History) -> list[tuple[str, str]]:
    """Names and values of the few numbers that matter most."""
    facts = [("samples seen", count(run.samples_seen))]
    for name in score_names([run]):
        records = [r for r in run.evaluations if np.isfinite(number(r, name))]
        best = (max if higher_is_better(name) else min)(records, key=lambda r: number(r, name))
        facts.append((f"best {name}", score(number(best, name))))
    if run.validations:
        facts.append(("validation loss", score(number(run.lines[run.validations[-1]], "validation_loss"))))
    if run.steps:
        last = [number(run.lines[i], "loss") for i in run.steps[-max(1, len(run.steps) // 20) :]]
        facts.append(("training loss", score(float(np.nanmean(last)) if np.isfinite(last).any() else np.nan)))
        speeds = [number(run.lines[i], "images_per_second") for i in run.steps]
        finite = [s for s in speeds if np.isfinite(s)]
        facts.append(("images per second", score(float(np.median(finite)) if finite else np.nan)))
        facts.append(("running time", duration(run.hours[-1])))
    return facts


def _pill(run: History) -> Markup:
    word = str(run.outcome.get("outcome", "unknown"))
    known = word if word in ("done", "failed", "wrong_input", "stopped", "running") else ""
    return tag("span", word.replace("_", " "), class_=f"pill {known}".strip())


def _swatch(k: int) -> Markup:
    return tag("span", tag("span", class_="swatch"), class_=f"r{k % 8}")


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(k: int, run: History, gallery: Gallery, runs: int) -> Markup:
    heading = tag("h2", "Samples" + (f" · {run.name}" if runs > 1 else ""))
    notes = [tag("p", note, class_="note") for note in gallery.notes]
    if not gallery.frames:
        return tag("section", heading, *(notes or [tag("p", "There are no sample grids.", class_="note")]))
    last = gallery.frames[-1]
    crisp = "crisp" if gallery.image_size < CRISP_BELOW else ""
    labels = tag("ol", *(tag("li", name) for name in gallery.rows)) if gallery.rows else ""
    generated = tag("img", class_=f"generated {crisp}".strip(), src=last.source, alt=f"generated images at {last.samples} samples seen")
    prints = [tag("figure", tag("figcaption", "generated, from the averaged weights"), tag("div", labels, generated, class_="mat"), class_="print")]
    if gallery.real:
        real = tag("img", class_=crisp or None, src=gallery.real, alt="real images in the same layout")
        prints.append(tag("figure", tag("figcaption", f"real, from {gallery.real_from}"), tag("div", labels, real, class_="mat"), class_="print"))
    slider = ""
    if len(gallery.frames) > 1:
        slider = tag(
            "label",
            tag("span", "after"),
            tag("output", f"{last.samples:,}"),
            tag("span", "samples seen"),
            tag("input", type="range", min=0, max=len(gallery.frames) - 1, value=len(gallery.frames) - 1, step=1, data_grids=k, aria_label="sample grids through training"),
            class_="slide",
        )
    if len(gallery.frames) < gallery.frames_of:
        notes.append(tag("p", f"{len(gallery.frames)} of {gallery.frames_of} grids are shown.", class_="note"))
    explanation = tag("p", "The same noise and labels at every point of training.", class_="soft")
    return tag("section", heading, explanation, tag("div", tag("div", *prints, class_="pair"), slider, class_="card"), *notes)


# ------------------------------------------------------------------------------------------------------------- curves


def _curves(runs: Sequence[History], charts: Sequence[Chart], plots: str) -> Markup:
    if not charts:
        return tag("section", tag("h2", "Curves"), tag("p", "There is nothing to plot yet.", class_="note"))
    axes = [("samples", "samples seen"), ("hours", "hours")]
    switch = tag(
        "div",
        *(tag("button", words, type="button", data_axis=a, aria_pressed=str(a == "samples").lower()) for a, words in axes),
        class_="switch", role="group", aria_label="horizontal axis",
    )  # fmt: skip
    legend: Any = ""
    if len(runs) > 1:
        legend = tag("div", *(
            tag("button", tag("span", class_="swatch"), run.name, type="button", data_run=k, aria_pressed="true", class_=f"r{k % 8}")
            for k, run in enumerate(runs)
        ), class_="legend")  # fmt: skip
    figures = [
        tag("figure", tag("figcaption", tag("b", chart.title), tag("span", chart.caption)),
            Markup(f'<svg role="img" aria-label="{tag("i", chart.title)[3:-4]}"></svg>'), class_="card chart", data_chart=i)
        for i, chart in enumerate(charts)
    ]  # fmt: skip
    notes = "Hours are of running, start-up included; pauses between attempts and work lost to a kill are not."
    if any(chart.marks for chart in charts):
        notes += " Dashed lines with a flag are restarts."
    return tag(
        "section",
        tag("h2", "Curves"),
        tag("div", switch, legend, class_="controls"),
        tag("noscript", tag("p", f"Curves on this page need JavaScript; the same ones are PNG files in {plots}/.", class_="note")),
        tag("div", *figures, class_="charts"),
        tag("p", f"{notes} The same plots as PNG files: {plots}/", class_="note"),
    )


# ------------------------------------------------------------------------------------------------------- memorisation


def _memorisation(run: History, found: Neighbours | None, size: int, runs: int) -> Markup:
    if found is None:
        return Markup("")
    median, held_out = float(np.median(found.distance_N)), found.held_out_M
    sentence = (
        f"The {len(found.distance_N)} samples of the newest grid against {count(found.searched)} of the "
        f"{count(found.of)} training images, by root mean square difference of pixels (0 to 1"
        + (f", at {THUMBNAIL} pixels a side" if size > THUMBNAIL else "")
        + f"). Half of the samples are farther than {median:.3f} from their nearest training image"
    )
    if len(held_out):
        sentence += f"; of {len(held_out)} real images that were not trained on, half are farther than {float(np.median(held_out)):.3f}. "
        sentence += "Samples copied from the training data would lie far left of those."
    else:
        sentence += ". No images were held out to compare with."
    crisp = "crisp" if size < CRISP_BELOW else None
    cards = []
    for row, near in zip(found.rows, found.row_distances, strict=True):
        images = [tag("img", src=data_uri(to_pil(image)), alt="", class_=crisp) for image in row]
        cells = [tag("span", images[0], "sample"), tag("i")]
        cells += [tag("span", image, f"{d:.3f}") for image, d in zip(images[1:], near, strict=True)]
        cards.append(tag("div", *cells))
    return tag(
        "section",
        tag("h2", "Nearest training images" + (f" · {run.name}" if runs > 1 else "")),
        tag("p", sentence, class_="soft"),
        tag("div", _strip(found), tag("div", *cards, class_="neighbours"), class_="card"),
        tag("p", f"The {len(cards)} samples nearest to a training image, each with its {NEIGHBOURS} nearest and their "
            "distances.", class_="note"),
    )  # fmt: skip


def _strip(found: Neighbours) -> Markup:
    """Distances as dots on a line: samples above, held-out images below."""
    rows = [("samples", found.distance_N, 0), ("held-out real images", found.held_out_M, 1)]
    most = max(float(d.max()) for _, d, _ in rows if len(d)) * 1.05 or 1.0
    parts = []
    for line, (name, distance_n, colour) in enumerate((r for r in rows if len(r[1]))):
        y = 22 + 42 * line
        parts.append(f'<text x="0" y="{y - 8}">{name}</text><g class="r{colour}">')
        jitter = [(7 * i) % 11 - 5 for i in range(len(distance_n))]
        parts += [
            f'<circle class="dot" cx="{1000 * d / most:.1f}" cy="{y + 8 + j}" r="3.5"/>'
            for d, j in zip(distance_n.tolist(), jitter, strict=True)
        ]
        parts.append("</g>")
    parts.append(f'<text x="0" y="108">0</text><text x="1000" y="108" text-anchor="end">{most:.2f}</text>')
    label = "distances to the nearest training image"
    return Markup(f'<svg class="strip" viewBox="0 0 1000 112" role="img" aria-label="{label}">{"".join(parts)}</svg>')


# -------------------------------------------------------------------------------------------------------- config, past


def _configs(runs: Sequence[History]) -> Markup:
    flat = [flatten(run.config) for run in runs]
    parts = [tag("h2", "Config")]
    if len(runs) > 1:
        keys = list(dict.fromkeys(key for one in flat for key in one))
        differing = [key for key in keys if len({repr(one.get(key, "–")) for one in flat}) > 1]
        rows = [[tag("code", key), *(tag("code", one.get(key, "–")) for one in flat)] for key in differing]
        head = ["key", *(join([_swatch(k), run.name]) for k, run in enumerate(runs))]
        parts.append(
            tag("div", table(head, rows), class_="card") if rows else tag("p", "The runs have equal configs.", class_="note")
        )
    for run in runs:
        words = "The whole config" + (f" of {run.name}" if len(runs) > 1 else "")
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(tag("details", tag("summary", words), tag("pre", text)))
    return tag("section", *parts)


def _provenance(run: History, runs: int) -> Markup:
    parts = [tag("h2", "Provenance" + (f" · {run.name}" if runs > 1 else "")), tag("div", _origin(run), class_="card")]
    if run.evaluations:
        parts += [tag("h3", "Scores"), tag("div", of_scores(run), class_="card")]
    if run.attempts:
        head = ["started", "processes", "host", "job", "Python", "ldt", "source", "command"]
        rows = [
            [date(number(a, "time")), a.get("world_size", "–"), a.get("host", "–"), a.get("job") or "–",
             a.get("python", "–"), a.get("ldt", "–"), tag("code", str(a.get("git") or "–")[:12] + ("-dirty" if str(a.get("git")).endswith("-dirty") else "")), tag("code", _command(a))]
            for a in run.attempts
        ]  # fmt: skip
        parts += [tag("h3", f"Attempts ({len(rows)})"), tag("div", table(head, rows), class_="card")]
    return tag("section", *parts)


def _origin(run: History) -> Markup:
    items: list[tuple[str, Any]] = [("run directory", tag("code", run.path))]
    items.append(("outcome", join([_pill(run), " ", run.outcome.get("message", "")])))
    if run.checkpoint:
        manifest = run.checkpoint.manifest
        sampling, written = manifest.get("sampling", {}), manifest.get("written_by", {})
        versions = ", ".join(f"{k} {v}" for k, v in written.items() if k not in ("time", "world_size", "zero_stage"))
        made = f"{date(number(written, 'time'))} by {written.get('world_size')} processes at ZeRO stage {written.get('zero_stage')}"
        items += [
            ("newest checkpoint", join([tag("code", run.checkpoint.path.name), f", {made}"])),
            ("checkpoint hash", tag("code", run.checkpoint.hash)),
            ("versions", versions),
            ("data fingerprint", tag("code", manifest.get("progress", {}).get("data_fingerprint", "–"))),
            ("autoencoder", join([sampling.get("autoencoder", "–"), " ", tag("code", sampling.get("autoencoder_hash", ""))])),
            ("random numbers", f"version {manifest.get('rng_version')}, seed {manifest.get('config', {}).get('seed', '–')}"),
        ]  # fmt: skip
        skipped = manifest.get("progress", {}).get("skipped")
        items.append(("skipped samples", count(len(skipped)) if skipped else ""))
    return pairs(items)


def _command(attempt: dict[str, Any]) -> str:
    command = attempt.get("command", "–")
    if not isinstance(command, list):
        return str(command)
    words = [str(word) for word in command]
    return " ".join([words[0].rsplit("/", 1)[-1], *words[1:]]) if words else "–"
