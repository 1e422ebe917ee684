"""The report's page: one self-contained HTML file that loads nothing from elsewhere."""

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from ldt import __version__
from ldt.image_files import to_pil
from ldt.reporting.curves import Chart, best_score, score_names, unlike
from ldt.reporting.history import History, number
from ldt.reporting.html import Markup, content_hash, join, script_json, table, tag
from ldt.reporting.pictures import NEIGHBOURS, THUMBNAIL, Neighbours, Pixels, data_uri
from ldt.reporting.provenance import COLOURS, configs, pill, provenance, swatch
from ldt.reporting.reach import Reach
from ldt.reporting.summary import count, data_words, date, duration, model_words, outcome_words, score

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


def make_page(
    runs: Sequence[History], charts: Sequence[Chart], galleries: Sequence[Gallery], plots: str, reached: Sequence[Reach]
) -> str:
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
        _reached(runs, reached),
        *(_memorisation(run, g.neighbours, g.image_size, len(runs)) for run, g in zip(runs, galleries, strict=True)),
        configs(runs),
        *(provenance(run, len(runs)) for run in runs),
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
    single = len(runs) == 1
    notes = [tag("p", note if single else f"{run.name}: {note}") for run in runs for note in run.notes]
    return tag(
        "header",
        tag("p", "ldt · training report", class_="overline"),
        tag("h1", " · ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"),
        *(_one(runs[0]) if single else _several(runs)),
        tag("div", *notes, class_="notes") if notes else "",
    )


def _one(run: History) -> list[Markup]:
    words = join([model_words(run), " ", data_words(run), " ", outcome_words(run), " ", pill(run)])
    tiles = [tag("div", tag("b", value), tag("span", name), class_="tile") for name, value in _facts(run)]
    return [tag("p", words, class_="lead"), tag("div", *tiles, class_="tiles")]


def _several(runs: Sequence[History]) -> list[Markup]:
    facts = [dict(_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = []
    for k, run in enumerate(runs):
        rows.append([join([swatch(k), run.name, " ", pill(run)]), *(facts[k].get(name, "–") for name in names)])
    words = [
        tag("p", join([swatch(k), f"{run.name}: {model_words(run)} {data_words(run)} {outcome_words(run)}"]))
        for k, run in enumerate(runs)
    ]
    notes = [
        tag("p", f"The best {name} of the runs do not compare: they differ in {', '.join(keys)}.", class_="note")
        for name in score_names(runs)
        if (keys := unlike(runs, name))
    ]
    return [tag("div", *words, class_="words"), tag("div", table(["run", *names], rows), class_="card"), *notes]


def _facts(run: History) -> list[tuple[str, str]]:
    """Names and values of the few numbers that matter most."""
    facts = [("samples seen", count(run.samples_seen))]
    for name in score_names([run]):
        facts.append((f"best {name}", score(best_score(run, name))))
    if run.validations:
        last_line = run.lines[run.validations[-1]]
        facts.append(("validation loss", score(number(last_line, "validation_loss"))))
        by_bucket = last_line.get("validation_loss_by_bucket")
        if isinstance(by_bucket, dict):
            facts += [(f"validation loss of {name}", score(number(by_bucket, name))) for name in sorted(by_bucket)]
    if run.steps:
        last = [number(run.lines[i], "loss") for i in run.steps[-max(1, len(run.steps) // 20) :]]
        facts.append(("training loss", score(float(np.nanmean(last)) if np.isfinite(last).any() else np.nan)))
        speeds = [number(run.lines[i], "images_per_second") for i in run.steps]
        finite = [s for s in speeds if np.isfinite(s)]
        facts.append(("images per second", score(float(np.median(finite)) if finite else np.nan)))
        facts.append(("running time", duration(run.hours[-1])))
    return facts


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(k: int, run: History, gallery: Gallery, runs: int) -> Markup:
    heading = tag("h2", "Samples" + (f" · {run.name}" if runs > 1 else ""))
    notes = [tag("p", note, class_="note") for note in gallery.notes]
    if not gallery.frames:
        return tag("section", heading, *(notes or [tag("p", "There are no sample grids.", class_="note")]))
    if len(gallery.frames) < gallery.frames_of:
        notes.append(tag("p", f"{len(gallery.frames)} of {gallery.frames_of} grids are shown.", class_="note"))
    last = gallery.frames[-1]
    what = f"generated images at {last.samples:,} samples seen"
    prints = [_print("generated, by the averaged weights", gallery, last.source, what, "generated")]
    if gallery.real:
        prints.append(_print(f"real, from {gallery.real_from}", gallery, gallery.real, "real images", ""))
    slider = _slider(k, gallery.frames) if len(gallery.frames) > 1 else tag("p", what, class_="note")
    explanation = tag("p", "The same noise and labels at every point of training.", class_="soft")
    card = tag("div", tag("div", *prints, class_="pair"), slider, class_="card")
    return tag("section", heading, explanation, card, *notes)


def _print(caption: str, gallery: Gallery, source: str, what: str, class_: str) -> Markup:
    """A picture with the names of its rows."""
    rows = tag("ol", *(tag("li", name) for name in gallery.rows)) if gallery.rows else ""
    classes = f"{class_} {_crisp(gallery.image_size)}".strip()
    image = tag("img", src=source, alt=what, class_=classes or None)
    return tag("figure", tag("figcaption", caption), tag("div", rows, image, class_="mat"), class_="print")


def _slider(k: int, frames: Sequence[Frame]) -> Markup:
    last = len(frames) - 1
    bar = tag("input", type="range", min=0, max=last, value=last, step=1, data_grids=k, aria_label="point of training")
    return tag(
        "label", tag("span", "after ", tag("output", f"{frames[-1].samples:,}"), " samples seen"), bar, class_="slide"
    )


def _crisp(size: int) -> str:
    return "crisp" if 0 < size < CRISP_BELOW else ""


# ------------------------------------------------------------------------------------------------------------- curves


def _curves(runs: Sequence[History], charts: Sequence[Chart], plots: str) -> Markup:
    heading = tag("h2", "Curves")
    if not charts:
        return tag("section", heading, tag("p", "There is nothing to plot yet.", class_="note"))
    notes = "Hours are of running, start-up included; pauses between attempts and work lost to a kill are not."
    if any(chart.marks for chart in charts):
        notes += " Dashed lines with a flag are restarts."
    without = f"The curves need JavaScript; the same ones are PNG files in {plots}/."
    return tag(
        "section",
        heading,
        tag("div", _axis_switch(), _legend(runs), class_="controls"),
        tag("noscript", tag("p", without, class_="note")),
        tag("div", *(_chart(i, chart) for i, chart in enumerate(charts)), class_="charts"),
        tag("p", f"{notes} The same plots as PNG files: {plots}/", class_="note"),
    )


def _axis_switch() -> Markup:
    axes = {"samples": "samples seen", "hours": "hours", "compute": "compute"}
    buttons = [
        tag("button", words, type="button", data_axis=axis, aria_pressed="true" if axis == "samples" else "false")
        for axis, words in axes.items()
    ]
    return tag("div", *buttons, class_="switch", role="group", aria_label="horizontal axis")


def _legend(runs: Sequence[History]) -> Markup:
    """The runs' colours, as buttons that hide and show them; empty for a single run."""
    if len(runs) == 1:
        return Markup("")
    line = tag("span", class_="swatch")
    buttons = [
        tag("button", line, run.name, type="button", data_run=k, aria_pressed="true", class_=f"r{k % COLOURS}")
        for k, run in enumerate(runs)
    ]
    return tag("div", *buttons, class_="legend")


def _chart(i: int, chart: Chart) -> Markup:
    caption = tag("figcaption", tag("b", chart.title), tag("span", chart.caption))
    return tag("figure", caption, tag("svg", role="img", aria_label=chart.title), class_="card chart", data_chart=i)


# ---------------------------------------------------------------------------------------------------- to reach a score


def _reached(runs: Sequence[History], reached: Sequence[Reach]) -> Markup:
    if not reached:
        return Markup("")
    words = (
        "Until the first evaluation that is as good. Runs that differ in their seed alone share a line: the mean, and "
        "the least to the most. Compute is that of training, three forward passes a sample."
    )
    head = ["runs", "score", "to reach", "reached", "samples", "hours", "compute (10¹⁵ FLOP)"]
    rows = [
        [
            join(part for k in row.runs for part in (swatch(k), runs[k].name, " ")),
            row.score,
            score(row.target),
            f"{len(row.samples)} of {len(row.runs)}",
            spread(row.samples, count),
            spread(row.hours, score),
            spread(row.compute, score),
        ]
        for row in reached
    ]
    return tag("section", tag("h2", "To reach a score"), tag("p", words, class_="soft"),
               tag("div", table(head, rows), class_="card"))  # fmt: skip


def spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """The mean, and where there are several, the least and the most."""
    if not values:
        return "–"
    mean = shown(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"


# ------------------------------------------------------------------------------------------------------- memorisation


def _memorisation(run: History, found: Neighbours | None, size: int, runs: int) -> Markup:
    if found is None:
        return Markup("")
    cards = [_neighbours(row, near, size) for row, near in zip(found.rows, found.row_distances, strict=True)]
    last = (
        f"The {len(cards)} samples nearest to a training image, each with its {NEIGHBOURS} nearest and their distances."
    )
    return tag(
        "section",
        tag("h2", "Nearest training images" + (f" · {run.name}" if runs > 1 else "")),
        tag("p", _memorisation_words(found, size), class_="soft"),
        tag(
            "div", _strip(found), tag("p", last, class_="note"), tag("div", *cards, class_="neighbours"), class_="card"
        ),
    )


def _memorisation_words(found: Neighbours, size: int) -> str:
    reduced = f", at {THUMBNAIL} pixels a side" if size > THUMBNAIL else ""
    words = (
        f"Each of the {len(found.distance_N)} samples of the newest grid against {count(found.searched)} of "
        f"{count(found.of)} training images: root mean square difference of pixels, 0 to 1{reduced}. "
        f"The median sample is {float(np.median(found.distance_N)):.3f} from its nearest training image"
    )
    if not len(found.held_out_M):
        return f"{words}. No images were held out of training to compare with."
    return (
        f"{words}; the median of {len(found.held_out_M)} real images that were held out of training is "
        f"{float(np.median(found.held_out_M)):.3f}. Copies of training images would lie far left of those."
    )


def _neighbours(row: Sequence[Pixels], near: Sequence[float], size: int) -> Markup:
    images = [tag("img", src=data_uri(to_pil(image)), alt="", class_=_crisp(size) or None) for image in row]
    found = [tag("span", image, f"{d:.3f}") for image, d in zip(images[1:], near, strict=True)]
    return tag("div", tag("span", images[0], "sample"), tag("i"), *found)


def _strip(found: Neighbours) -> Markup:
    """Distances as dots on a line from 0: samples above, held-out images below."""
    rows = [("samples", "ours", found.distance_N), ("held-out real images", "theirs", found.held_out_M)]
    rows = [row for row in rows if len(row[2])]
    most = max(float(d.max()) for _, _, d in rows) * 1.02 or 1.0
    parts = []
    for line, (name, class_, distance_n) in enumerate(rows):
        y = 14 + 44 * line
        dots = [
            tag("circle", cx=f"{98 * d / most + 1:.2f}%", cy=y + 16 + (7 * i) % 11 - 5, r=3.5, class_="dot")
            for i, d in enumerate(distance_n.tolist())
        ]
        parts.append(tag("g", tag("text", name, x=0, y=y), *dots, class_=class_))
    y = 44 * len(rows) + 18
    ends = [tag("text", "0", x=0, y=y), tag("text", f"{most:.2f}", x="100%", y=y, text_anchor="end")]
    label = "distances to the nearest training image"
    return tag("svg", *parts, *ends, class_=f"strip lines{len(rows)}", role="img", aria_label=label)
