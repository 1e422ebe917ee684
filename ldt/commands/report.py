"""One HTML page about one or several runs, made from their files alone, and a PNG of every plot beside it.

The page needs no network and holds everything it shows: curves with all runs overlaid, sample grids through training,
real images beside generated ones, each sample's nearest training images, config differences and provenance. What a run
does not have (yet) is said on the page.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ldt import log
from ldt.config_fields import path_field, path_list_field
from ldt.errors import InputError, by_reason
from ldt.files import replacing
from ldt.image_files import MOST_ROWS, write_picture
from ldt.reporting.curves import make_charts, score_names
from ldt.reporting.history import History, read_history
from ldt.reporting.page import Frame, Gallery, make_page
from ldt.reporting.pictures import (
    Neighbours,
    RealImages,
    Unavailable,
    check_alike,
    choose,
    data_uri,
    nearest,
    newest_cells,
    open_picture,
    open_real,
    picture_of,
    real_rows,
)
from ldt.reporting.png import write_plots
from ldt.reporting.reach import VALIDATION, reaches

logger = log.get_logger(__name__)


@dataclass
class ReportJob:
    """`runs`: run directories. `output`: the page, empty for report.html in the first run.

    `grids`: the most sample grids to put on the page. `neighbours`: how many training images to search for each
    sample's nearest ones, spread evenly over the data; 0 leaves the search out. `targets`: a value of a score by its
    name, for the table of what it took to reach it; for the others what all of several runs have reached.
    """

    runs: list[str] = path_list_field()
    output: str = path_field()
    grids: int = 24
    neighbours: int = 10_000
    targets: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("nothing to report on; give one or more run directories: ldt report RUN [RUN ...]")
        if self.grids < 2:
            raise InputError(f"grids={self.grids} must be at least 2, for the first and the last")
        if self.neighbours < 0:
            raise InputError(f"neighbours={self.neighbours} must be positive, or 0 to leave the search out")
        if self.output and not self.output.endswith(".html"):
            raise InputError(f"output={self.output} must end in .html; plots go into a directory of the same name")


def run(config: ReportJob) -> int:
    """Write the page and its PNGs, and print where they are."""
    paths = [Path(run) for run in config.runs]
    runs = [read_history(path, name) for path, name in zip(paths, names(paths), strict=True)]
    unknown = [name for name in config.targets if name not in (*score_names(runs), VALIDATION)]
    if unknown:
        known = ", ".join((*score_names(runs), VALIDATION))
        raise InputError(f"targets has {unknown[0]}, which no run was scored by; the scores there are {known}")
    output = Path(config.output) if config.output else paths[0] / "report.html"
    plots = output.with_suffix("")
    charts = make_charts(runs)
    try:
        plots.mkdir(parents=True, exist_ok=True)
        write_plots(charts, plots)
        galleries = [gallery(history, config, plots, prefix(history, runs)) for history in runs]
        page = make_page(runs, charts, galleries, plots.name, reaches(runs, config.targets))
        with replacing(output) as temporary:
            temporary.write_bytes(page.encode(errors="replace"))  # a lone surrogate in a file is no reason to fail
    except OSError as error:
        raise by_reason(f"{output} can't be written ({error.strerror}); give another output=", error) from None
    for history in runs:
        for note in history.notes:
            logger.info("%s: %s", history.name, note)
    print(f"report on {', '.join(r.name for r in runs)}: {output}")
    return 0


def names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as much of it as tells the runs apart."""
    resolved = [path.resolve() for path in paths]
    twice = [str(p) for p, n in Counter(resolved).items() if n > 1]
    if twice:
        raise InputError(f"run {twice[0]} is given twice; give each run once")
    if len({p.name for p in resolved}) == len(resolved):
        return [p.name for p in resolved]
    common = os.path.commonpath([p.parent for p in resolved])
    return [str(p.relative_to(common)) for p in resolved]


def prefix(history: History, runs: list[History]) -> str:
    """What the names of a run's pictures start with, so that several runs do not overwrite each other's."""
    return "" if len(runs) == 1 else f"{runs.index(history)}_"


def gallery(history: History, config: ReportJob, directory: Path, prefix: str) -> Gallery:
    """The pictures of a run, also written as PNGs into a directory."""
    notes: list[str] = []
    opened = [(s, open_picture(path)) for s, path in history.grids]
    pictures = [(s, picture) for s, picture in opened if picture is not None]
    if len(pictures) < len(opened):
        notes.append(f"{len(opened) - len(pictures)} sample grids are not readable and left out.")
    frames = [Frame(pictures[i][0], data_uri(pictures[i][1])) for i in choose(len(pictures), config.grids)]
    size, classes = _layout(history)
    real: RealImages | None = None
    real_picture, neighbours, rows = "", None, []
    if pictures and size:
        samples_seen, last = pictures[-1]
        write_picture(directory / f"{prefix}generated.png", last)
        try:
            cells = newest_cells(history, samples_seen)
            by_class = len(cells) == len(classes) <= MOST_ROWS
            rows = classes if by_class else []
            real = open_real(history)
            check_alike(cells, real)
            picture = picture_of(real_rows(real, cells, by_class))
            write_picture(directory / f"{prefix}real.png", picture)
            real_picture = data_uri(picture)
            neighbours = _neighbours([c for row in cells for c in row], real, config, directory, prefix)
        except (Unavailable, InputError) as error:
            notes.append(f"Real images and nearest neighbours are left out: {error}.")
    return Gallery(
        frames=frames,
        frames_of=len(pictures),
        rows=rows,
        real=real_picture,
        real_from=real.path if real else "",
        image_size=size,
        neighbours=neighbours,
        notes=notes,
    )


def _neighbours(samples: list, real: RealImages, config: ReportJob, directory: Path, prefix: str) -> Neighbours | None:
    if not config.neighbours:
        return None
    found = nearest(samples, real, config.neighbours)
    write_picture(directory / f"{prefix}neighbours.png", picture_of(found.rows))
    return found


def _layout(history: History) -> tuple[int, list[str]]:
    """Side of a sample in pixels and the names of the classes; 0 and none without a checkpoint."""
    if not history.checkpoint:
        return 0, []
    spec = history.checkpoint.manifest["sampling"]
    return int(spec["image_size"]), [str(name) for name in spec["classes"]]
