"""Train the first samples of a run again, and say whether it is the same run: `ldt verify RUN|RECORD`.

A record is a directory with a run's config.yaml and metrics.jsonl (`tools/make_record.py`); with its hashes.json, files
that were changed since are named first. What is trained again may be anywhere: any world size, ZeRO stage, micro-batch
or shard format, given as key=value like everything else; data.path where the data lie elsewhere.

Digests must be equal at every logged step. Losses must agree to 5 digits over the first 50 steps, which is what promise
1 promises in fp32; later Adam has amplified the rounding. Exit codes: 0 the same, 1 another run or none.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ldt import rng
from ldt.config_fields import path_field, required_path_field
from ldt.dist import SLOWEST_RANK_TIMEOUT, broadcast, process_group
from ldt.errors import InputError
from ldt.files import parse_json
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.config import CheckpointConfig, LogConfig, TrainJob

STEPS = 50
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative, of a loss over the first `STEPS` steps."""

HASHES = "hashes.json"
SAME, ANOTHER = 0, 1


@dataclass
class VerifyJob(TrainJob):
    """The keys of the run's training, and `run`: the run directory or record.

    `samples`: how many to train again, 0 for 50 steps. `output`: a directory for it, which stays; empty for a temporary
    one.
    """

    run: str = required_path_field()
    samples: int = 0
    output: str = path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0:
            raise InputError(f"samples={self.samples} must be positive, or 0 for {STEPS} steps")


def run(config: VerifyJob) -> int:
    """Train and compare; returns the exit code."""
    record, samples = Path(config.run), config.samples or STEPS * config.train.global_batch
    logged = [line for line in read_jsonl(record / "metrics.jsonl") if "digest" in line]
    then = {line["samples_seen"]: line for line in logged if line["samples_seen"] <= samples}
    if not then:
        raise InputError(
            f"{record / 'metrics.jsonl'} has no logged step within {samples} samples; give samples= of at least the "
            "first one's samples_seen"
        )
    problems = changed_files(record)
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        with _directory(config.output, world.rank) as directory:
            attempt(_again(config, directory), world, max(then), begun_with(record))
            now = {line["samples_seen"]: line for line in read_jsonl(directory / "metrics.jsonl") if "digest" in line}
        problems += differences(then, now, config.train.global_batch, TOLERANCE[config.engine.precision])
        if world.rank == 0:
            for problem in problems:
                print(f"differs: {problem}")
            print(f"{'another run than' if problems else f'the same run, {len(then)} logged steps of'}: {record}")
    return ANOTHER if problems else SAME


def begun_with(record: Path) -> int:
    """The version of the random numbers that a run began with: 2 where its first attempt says none."""
    attempts = list(read_jsonl(record / "environment.jsonl"))
    version = attempts[0].get("rng_version", 2) if attempts else rng.VERSION
    if version not in rng.VERSIONS:
        raise InputError(f"{record} was trained with random numbers of version {version}; use the ldt that wrote it")
    return int(version)


def _again(config: VerifyJob, directory: Path) -> TrainJob:
    """The record's training, into another directory, logging every step and making nothing else."""
    keys = {name: getattr(config, name) for name in TrainJob.__dataclass_fields__}
    log = LogConfig(every_samples=config.log.every_samples)
    job = TrainJob(**keys | {"run_dir": str(directory), "log": log, "checkpoint": CheckpointConfig()})
    return replace(job, ema=replace(config.ema, snapshot_every_samples=0))


@contextlib.contextmanager
def _directory(output: str, rank: int) -> Iterator[Path]:
    if output:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="ldt-verify-") if rank == 0 else contextlib.nullcontext("") as made:
        yield Path(broadcast(made))
        broadcast("")  # no rank reads there any more


def changed_files(record: Path) -> list[str]:
    """The files of a record that are not what its hashes.json says; none for a run directory, which has no such."""
    try:
        hashes: Any = parse_json((record / HASHES).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"{record / HASHES} can't be read ({error})"]
    if not isinstance(hashes, dict):
        return [f"{record / HASHES} is no mapping of files to hashes"]
    return [
        f"{name} was changed since the record was made" for name in hashes if hash_file(record / name) != hashes[name]
    ]


def hash_file(path: Path) -> str:
    """xxh3 of a file's content, empty where it can't be read."""
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError:
        return ""


def differences(
    then: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], batch: int, tolerance: float
) -> list[str]:
    """Where two logs differ: at the first unequal digest, and at the first unequal loss of the first `STEPS` steps."""
    for seen, line in then.items():
        if seen not in now:
            return [f"at {seen} samples nothing was logged this time"]
        if now[seen]["digest"] != line["digest"]:
            return [f"at {seen} samples the digest was {line['digest']} and is {now[seen]['digest']} now"]
    for seen, line in then.items():
        loss, again = line["loss"], now[seen]["loss"]
        if seen <= STEPS * batch and not abs(again - loss) <= tolerance * abs(loss):
            return [f"at {seen} samples the loss was {loss} and is {again} now"]
    return []
