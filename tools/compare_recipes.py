"""What a recipe needs to reach the score of the tuned DiT, with both trained and scored here.

    python tools/compare_recipes.py --recipe configs/recipes/small.yaml --recipe-samples 20000 --seeds 0,1

For each seed it trains the DiT arm (configs/study/dit.yaml) to its end and scores it, then trains the recipe and scores
its checkpoints: with the arm's sampler, steps, images and detector, on the same data and machine, guided as in the
arm's config and without any guidance. In the end it prints a table: the arm's last score (mean of the seeds), and the
samples, CPU time and FLOPs until the recipe's first checkpoint that is as good.

CPU time is that of the training alone, start-up included, of all its processes. FLOPs are the networks', without the
optimizer's. Started again, the same command goes on where it stopped; another --recipe or --recipe-samples finds the
DiT arm done. Settings like data.path=DIR after the options are for both.
"""

import argparse
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from program import run_tool
from ranks import start_ranks

from ldt.checkpoint.checkpoint import Checkpoint, checkpoints_of
from ldt.config import load
from ldt.log import append_jsonl, read_jsonl
from ldt.reporting.curves import score_names
from ldt.reporting.history import History, number, read_history
from ldt.reporting.reach import reaches
from ldt.reporting.summary import count, duration, score
from ldt.training.config import TrainJob

DIT = Path(__file__).parents[1] / "configs" / "study" / "dit.yaml"
SHARED = ("images", "sampler", "steps", "shift", "seed", "labels", "block", "precision", "detector")
"""Keys of an evaluation that both are given as the DiT arm has them."""

GUIDANCE = ("guidance", "guidance_inner", "guidance_low", "guidance_high")
UNGUIDED = {"guidance": 1.0, "guidance_inner": 1.0}
SAME = ("detector_hash", "reference_hash", "autoencoder_hash")
"""What all results must agree in."""

Settings = dict[str, Any]


class Failed(Exception):
    """A training or an evaluation did not come to its end; the message says which."""


@dataclass(frozen=True)
class Arm:
    """One of the two sides. settings: of its training; evaluations: the settings of the guided and of the other one."""

    name: str
    config: Path
    settings: list[str]
    samples: int
    checkpoints: str
    evaluations: list[Settings]


@dataclass(frozen=True)
class Cost:
    """Of the training until a score: samples, CPU seconds, and 10¹⁵ floating-point operations."""

    samples: float
    cpu_seconds: float
    compute: float


def main(arguments: list[str]) -> int:
    """Train, score, print; returns the exit code."""
    flags = parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        arms = plan(flags)
        for seed in flags.seeds:
            for arm in arms:
                train(arm, seed, flags)
                evaluate(arm, seed, flags)
        print("\n".join(table(arms, flags)))
    except Failed as error:
        print(f"compare_recipes: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what is no option of it is a setting of both trainings."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, required=True, help="a training config")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--samples", type=int, default=0, help="of the DiT arm's training, if not its config's")
    parser.add_argument("--recipe-samples", type=int, default=0, help="of the recipe's training, if not its config's")
    parser.add_argument("--checkpoints", type=int, default=12, help="of the recipe, at even distances; all are scored")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    flags, settings = parser.parse_known_args(arguments)
    if wrong := [word for word in settings if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    try:
        flags.seeds = [int(seed) for seed in flags.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {flags.seeds} must be numbers separated by commas, such as 0,1")
    flags.settings = settings
    return flags


def plan(flags: argparse.Namespace) -> list[Arm]:
    """The two sides, the DiT arm first."""
    dit, recipe = (load(TrainJob, path, flags.settings) for path in (DIT, flags.recipe))
    samples = [flags.samples or dit.train.total_samples, flags.recipe_samples or recipe.train.total_samples]
    every, keep = max(samples[1] // flags.checkpoints, 1), flags.checkpoints + 1
    shared = {key: getattr(dit.evaluate, key) for key in SHARED}
    evaluations = []
    for job in (dit, recipe):
        own = {key: getattr(job.evaluate, key) for key in GUIDANCE}
        evaluations.append([shared | own | {"guidance": dit.evaluate.guidance}, shared | own | UNGUIDED])
    return [
        Arm(f"dit-{samples[0]}", DIT, [], samples[0], "newest", evaluations[0]),
        Arm(
            f"{flags.recipe.stem}-{samples[1]}",
            flags.recipe,
            [f"checkpoint.every_samples={every}", f"checkpoint.keep={keep}"],
            samples[1],
            "all",
            evaluations[1],
        ),
    ]


def run_of(arm: Arm, seed: int, flags: argparse.Namespace) -> Path:
    """Where a seed of an arm is trained."""
    output: Path = flags.output
    return output / f"{arm.name}-seed{seed}"


def train(arm: Arm, seed: int, flags: argparse.Namespace) -> None:
    """Go on with a run to its end, and note the CPU time that it took."""
    run, settings = run_of(arm, seed, flags), [*flags.settings, *arm.settings]
    before = trained(run)
    words = [f"run_dir={run}", f"seed={seed}", f"train.total_samples={arm.samples}"]
    code, cpu_seconds = call(["train", arm.config, *settings, *words], flags.processes)
    if trained(run) > before:
        append_jsonl(run / "cpu.jsonl", {"samples": trained(run) - before, "cpu_seconds": cpu_seconds})
    if code:
        raise Failed(f"the training of {run} left with {code}; start the same command again to go on with it")


def trained(run: Path) -> int:
    """Samples seen by the newest checkpoint."""
    found = checkpoints_of(run)
    return Checkpoint.read(found[-1]).samples_seen if found else 0


def evaluate(arm: Arm, seed: int, flags: argparse.Namespace) -> None:
    """Score a run's checkpoints, as far as that was not done."""
    run, (guided, unguided) = run_of(arm, seed, flags), arm.evaluations
    scales = f"{guided['guidance']},{unguided['guidance']}"
    in_one_go = guided | {"guidance": unguided["guidance"]} == unguided
    for settings in [guided | {"guidance": scales}] if in_one_go else arm.evaluations:
        words = [f"evaluate.{key}={value}" for key, value in settings.items()]
        code, _ = call(["evaluate", run, f"evaluate.checkpoint={arm.checkpoints}", *words], flags.processes)
        if code:
            raise Failed(f"the evaluation of {run} left with {code}; start the same command again to go on with it")


def call(words: Sequence[object], processes: int) -> tuple[int, float]:
    """Exit code and CPU seconds of `ldt WORDS` on so many ranks, which are asked to stop when this process is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ranks = start_ranks(processes, "-m", "ldt", *words, stdout=sys.stderr, start_new_session=True)

    def stop(*_: object) -> None:
        for rank in ranks:
            rank.terminate()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return max(codes, key=abs), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# -------------------------------------------------------------------------------------------------------------- table


def table(arms: Sequence[Arm], flags: argparse.Namespace) -> list[str]:
    """Markdown: for each way of guidance and each score a line for either side."""
    dit, recipe = arms
    sides = [[read_history(run_of(arm, s, flags), f"{arm.name}, seed {s}") for s in flags.seeds] for arm in arms]
    check_same([run for side in sides for run in side])
    attempt = sides[0][0].attempts[-1]
    commit, seeds = str(attempt.get("git")).partition("-")[0][:10], " ".join(map(str, flags.seeds))
    lines = [
        f"{recipe.name} beside {dit.name}, seeds {seeds}, {flags.processes} processes on {attempt.get('hardware')}, "
        f"commit {commit}; of several seeds the mean, the least and the most.",
        "",
        "| guidance | score to reach | arm | seeds that did | samples | CPU time | 10¹⁵ FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for k, settings in enumerate(dit.evaluations):
        of_dit, of_recipe = (
            [only(run, arm.evaluations[k]) for run in side] for arm, side in zip(arms, sides, strict=True)
        )
        for name in score_names(of_dit):
            finals = [number(run.evaluations[-1], name) for run in of_dit]
            ends = [cost(run, dit.samples) for run in of_dit]
            reached = [cost(run, seen) for run in of_recipe for seen in first_samples(run, name, mean(finals))]
            guidance, inner = settings["guidance"], recipe.evaluations[k]["guidance_inner"]
            how = f"{guidance:g}" + (f", the recipe also guidance_inner={inner:g}" if inner != 1 else "")
            lines.append(f"| {how} | {name} {spread(finals, score)} | {dit.name} | all | {cells(ends)} |")
            lines.append(f"| | | {recipe.name} | {len(reached)} of {len(of_recipe)} | {cells(reached)} |")
            lines.append(f"| | | times less | | {' | '.join(ratios(ends, reached))} |")
    return lines


def check_same(runs: Sequence[History]) -> None:
    """`Failed` where runs were not judged against the same images by the same nets."""
    for key in SAME:
        if len(found := {r.get(key) for run in runs for r in run.evaluations}) > 1:
            raise Failed(f"the evaluations of {', '.join(run.name for run in runs)} differ in {key}: {found}")


def only(run: History, settings: Settings) -> History:
    """A run with those evaluations alone that were made with these settings."""

    def made_so(record: Settings) -> bool:
        return all(record.get(key, UNGUIDED.get(key)) == value for key, value in settings.items())

    return replace(run, evaluations=[r for r in run.evaluations if made_so(r)])


def first_samples(run: History, name: str, target: float) -> list[float]:
    """After how many samples a run had the score; empty if it never had."""
    return [samples for row in reaches([run], {name: target}) if row.score == name for samples in row.samples]


def cost(run: History, samples: float) -> Cost:
    """What the first samples of a run cost, by its mean CPU time a sample."""
    pieces = list(read_jsonl(run.path / "cpu.jsonl"))
    a_sample = sum(p["cpu_seconds"] for p in pieces) / sum(p["samples"] for p in pieces)
    return Cost(samples, samples * a_sample, samples * run.training_flops() / 1e15)


def cells(costs: Sequence[Cost]) -> str:
    """The last three columns."""
    if not costs:
        return "– | – | –"
    seconds = [c.cpu_seconds / 3600 for c in costs]
    columns = (spread([c.samples for c in costs], count), spread(seconds, duration))
    return " | ".join([*columns, spread([c.compute for c in costs], score)])


def ratios(more: Sequence[Cost], less: Sequence[Cost]) -> list[str]:
    """How many times less it took on the average; nothing where not all seeds had the score."""
    if len(less) < len(more):
        return ["–"] * 3
    keys = ("samples", "cpu_seconds", "compute")
    return [f"{mean(getattr(c, k) for c in more) / mean(getattr(c, k) for c in less):.2f}" for k in keys]


def spread(values: Sequence[float], words: Any) -> str:
    """The mean, and the least and greatest of values that differ."""
    low, high = words(min(values)), words(max(values))
    return words(mean(values)) + (f" ({low} to {high})" if low != high else "")


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
