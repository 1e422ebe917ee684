"""PNGs of the charts, for places that take no HTML."""

import warnings
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ldt.files import replacing
from ldt.reporting.curves import Chart

COLOURS = ("#2f6db5", "#c2571a", "#2e8b62", "#8d55a8", "#a87c12", "#b8456b", "#3f8f9c", "#6b6b6b")
INK, GRID = "#3a3a38", "#e4e2dc"


AXES = {"samples": "samples seen", "hours": "hours of running", "compute": "training compute"}


def write_plots(charts: list[Chart], directory: Path) -> list[Path]:
    """One PNG a chart and x axis: `<id>.png` over samples seen, `<id>_by_hours.png` over running hours, and over
    training compute `<id>_by_compute.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        for axis in AXES:
            path = directory / f"{chart.id}{'' if axis == 'samples' else f'_by_{axis}'}.png"
            with (
                rc_context({"text.parse_math": False}),  # a run may be called $x
                warnings.catch_warnings(),
                replacing(path) as temporary,
            ):
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # or have a name that this font can't write
                _figure(chart, axis).savefig(temporary, format="png", dpi=160)
            written.append(path)
    return written


def _figure(chart: Chart, axis: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for series in chart.series:
        style = {"line": "-", "faint": "-", "points": "o--"}[series.style]
        axes.plot(
            getattr(series, axis),
            series.y,
            style,
            color=COLOURS[series.run % len(COLOURS)],
            alpha=0.25 if series.style == "faint" else 1,
            linewidth=0.8 if series.style == "faint" else 1.6,
            markersize=4,
            label=None if series.style == "faint" else f" {series.label}",  # matplotlib hides labels like _this
        )
    for mark in chart.marks:
        colour = COLOURS[mark.run % len(COLOURS)]
        axes.axvline(getattr(mark, axis), color=colour, linewidth=0.8, linestyle=":")
    _dress(axes, chart, axis)
    return figure


def _dress(axes: Axes, chart: Chart, axis: str) -> None:
    axes.set_title(chart.title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(AXES[axis], color=INK)
    axes.set_ylabel(chart.caption if len(chart.caption) < 30 else "", color=INK)
    if axis == "samples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axis == "compute":
        axes.xaxis.set_major_formatter(lambda x, _: EngFormatter("FLOP")(1e15 * x))
    if chart.format == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8)
