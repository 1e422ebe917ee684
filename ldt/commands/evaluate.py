"""Score checkpoints of a run against real images, or follow a run and score each new one."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldt import tracking
from ldt.checkpoint.checkpoint import Checkpoint, checkpoints_of, resolve, results_of
from ldt.checkpoint.load import load_denoiser
from ldt.checkpoint.manifest import MANIFEST, MODEL
from ldt.cluster.gpus import choose_arithmetic
from ldt.config import to_dict
from ldt.config_fields import path_field, section
from ldt.dist import SLOWEST_RANK_TIMEOUT, World, broadcast, process_group, together
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig
from ldt.evaluation.follow import follow
from ldt.evaluation.parts import with_size
from ldt.evaluation.scorer import open_reference, score_once, short_hash
from ldt.files import check_writable_place, unwritable
from ldt.metrics.detectors import make_detector
from ldt.metrics.scores import check

Section = dict[str, Any]


@dataclass
class EvaluateJob:
    """`run` is a run directory or a checkpoint; without it `run_dir` of a training config is meant.

    `watch` follows the run directory and scores each new checkpoint until the run is done. `watch_job`: the training's
    job in SLURM, or its process; with it an earlier start that has said that the run is done ends nothing.

    The other sections are those of a training config, so that the same file serves both; of them only two are read:
    with `engine.deterministic` scores are the same to the bit on CUDA too; with `log.wandb` they are tracked, as a run
    of their own beside the training's.
    """

    run: str = path_field()
    run_dir: str = path_field()
    watch: bool = False
    watch_job: str = ""
    evaluate: EvaluateConfig = section(EvaluateConfig)
    seed: int = 0
    data: Section = field(default_factory=dict)
    model: Section = field(default_factory=dict)
    objective: Section = field(default_factory=dict)
    align: Section = field(default_factory=dict)
    train: Section = field(default_factory=dict)
    engine: Section = field(default_factory=dict)
    optimizer: Section = field(default_factory=dict)
    ema: Section = field(default_factory=dict)
    checkpoint: Section = field(default_factory=dict)
    log: Section = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.run or self.run_dir):
            raise InputError("nothing to evaluate; give a run directory, a checkpoint, or a config with run_dir")


def run(config: EvaluateJob) -> int:
    """Score the requested checkpoints on all ranks together; returns the exit code."""
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        evaluate(config, world)
    return 0


def run_sweep(jobs: list[EvaluateJob]) -> int:
    """Score with each of several settings; rank 0 ends with a table of them."""
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        results = [(to_dict(job.evaluate), result) for job in jobs for result in evaluate(job, world)]
        if world.rank == 0:
            for line in table(results):
                print(line)
            first = jobs[0]
            print(f"results: {_output(first.evaluate, select(_path(first), first.evaluate.checkpoint)[0])}")
    return 0


def table(results: list[tuple[Section, Section]]) -> Iterator[str]:
    """One line for each (settings, result): the settings that differ, the samples seen and the scores."""
    varied = [key for key in results[0][0] if len({str(settings[key]) for settings, _ in results}) > 1]
    scores = list(itertools.takewhile(lambda key: key not in results[0][0], list(results[0][1])[1:]))
    lines = [[*varied, "samples_seen", *scores]]
    for settings, result in results:
        cells = [settings[key] for key in varied] + [str(result["samples_seen"])]
        lines.append([_shown(cell) for cell in cells] + [f"{result[name]:.4f}" for name in scores])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _shown(cell: Any) -> str:
    return f"{cell:g}" if isinstance(cell, float) else str(cell)


def _path(config: EvaluateJob) -> Path:
    return Path(config.run or config.run_dir)


def _output(config: EvaluateConfig, checkpoint: Path) -> Path:
    """The evaluations.jsonl into which the scores of a checkpoint are written."""
    return Path(config.output) if config.output else results_of(checkpoint) / "evaluations.jsonl"


def evaluate(config: EvaluateJob, world: World) -> list[Section]:
    """`run` inside of a process group; rank 0 gets the results."""
    choose_arithmetic(bool(config.engine.get("deterministic")))
    settings, run_dir = config.evaluate, _path(config)
    detector = make_detector(settings.detector, world.device, settings.weights_file, settings.resize, settings.model)
    check(settings.metrics, detector)
    if config.watch:
        if (run_dir / "checkpoints").is_dir():
            advice = "watching notes there what it works on; score without --watch, and with"
            require_writable(run_dir / "checkpoints", advice)
        key = short_hash({k: v for k, v in to_dict(settings).items() if k != "checkpoint"})
        paths = follow(run_dir, key, world, config.watch_job)
    else:
        paths = iter(broadcast(select(run_dir, settings.checkpoint)))
    reference, results, mirror, start = None, [], None, time.time()
    with contextlib.ExitStack() as stack:
        for path in paths:
            loaded = load_denoiser(path, settings.weights, world.device)
            settings = with_size(settings, loaded)
            output = _output(settings, loaded.path)
            together(partial(check_writable_place, output))
            require_writable(output.parent, "give a file of your own as")
            if reference is None:  # all checkpoints of a run have the same
                reference = open_reference(settings, loaded, detector, world)
            result = score_once(settings, loaded, reference, detector, output, world)
            if world.rank != 0 or result is None:
                continue
            results.append(result)
            if config.log.get("wandb") and result["time"] >= start:
                if mirror is None:
                    wandb = partial(tracking.Wandb, output.parent, to_dict(settings), "evaluation")
                    mirror = stack.enter_context(tracking.Tracking(*tracking.start_or_warn(wandb)))
                mirror.log(result)
    return results


def require_writable(directory: Path, advice: str) -> None:
    """`InputError` before any work is done if a rank may not write there (collective)."""

    def check() -> None:
        if why := unwritable(directory):
            raise InputError(f"{directory} can't be written ({why}); {advice} evaluate.output=FILE")

    together(check)


def select(path: Path, which: str) -> list[Path]:
    """The checkpoints meant by a run directory and `newest`, `all` or a number of samples; or the one that is given."""
    if (path / MANIFEST).exists() or (path / MODEL).exists():
        return [path]
    if which == "newest" or not path.exists():
        return [resolve(path)]
    clocks = {p: Checkpoint.read(p).samples_seen for p in checkpoints_of(path)}
    chosen = [p for p, seen in clocks.items() if which == "all" or which == str(seen)]
    if not chosen:
        there = ", ".join(map(str, clocks.values())) or "none"
        raise InputError(f"evaluate.checkpoint={which} is not among the checkpoints of {path}: {there}")
    return chosen
