"""Break a training run again and again and check that its lineage is the run that was never disturbed.

    python tools/chaos.py --rounds 40 --seed 1 --json chaos.json

Each round starts the run where its checkpoints left it, on a random number of ranks at a random ZeRO stage, and does
one of FAULTS to it. In the end every step of the log must be there exactly once, with the digest that an undisturbed
run of one process has at this step, and with its loss to 5 digits over the first 50 steps.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capabilities import drop_overrides
from program import run_tool
from ranks import start_ranks
from shard_data import write_shards

from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import Damaged, listed
from ldt.files import write_json
from ldt.log import progress, read_jsonl

BATCH, SHARDS = 8, [40, 23, 30]
EXACT_STEPS, DIGITS = 50, 1e-5
STEPS_A_ROUND = 12
SLOW = float(os.environ.get("CHAOS_SLOW", "1"))  # how many times slower than an idle machine this one is
SAVE_STEPS, PATIENCE, STALL = 3, 120.0 * SLOW, 4.0 * SLOW
CACHE = "cache"
FILE_LIMIT = 60_000  # bytes a file on a "full" disk: enough for logs, not for a share of the weights
SETTINGS = [
    "seed=11",
    "model={width: 48, depth: 2, heads: 2}",
    f"train.global_batch={BATCH}",
    "optimizer.lr=1e-3",
    f"log.every_samples={BATCH}",
    f"checkpoint.every_samples={SAVE_STEPS * BATCH}",
    f"engine.stall_seconds={STALL}",
]

Ranks = list[subprocess.Popen[str]]
Campaign = Callable[[Path, Sequence[str], int], Sequence[Any]]  # of a directory, the faults and a seed: its rounds


class Failed(Exception):
    """A promise was broken; the message says which."""


@dataclass
class Round:
    """What was done in one round, and what it came to."""

    fault: str
    ranks: int
    stage: int
    resumed_at: int
    reached: int = 0
    codes: list[int] = field(default_factory=list)


def main() -> int:
    """Run the campaign; returns the exit code."""
    return command(
        __doc__, FAULTS, campaign, "every position exactly once, digests and losses those of the undisturbed run"
    )


def command(description: str | None, faults: Iterable[str], campaign: Campaign, promise: str) -> int:
    """The command line of a campaign, that of chaos_encode.py too: run and count its rounds."""
    known = list(faults)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(known))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--faults", nargs="+", choices=known, default=known, metavar="FAULT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ldt-chaos-") as directory:
        try:
            chosen = [arguments.faults[i % len(arguments.faults)] for i in range(arguments.rounds)]
            rounds = campaign(Path(directory), chosen, arguments.seed)
        except Failed as error:
            print(f"broken: {error}")
            return 1
    if arguments.json:
        write_json(arguments.json, [asdict(r) for r in rounds])
    print(f"{len(rounds)} rounds, {promise}")
    return 0


def campaign(root: Path, faults: Sequence[str], seed: int) -> list[Round]:
    """Disturb a run by each fault, in random order, let it end, and compare; `Failed` if it is another run then."""
    chance, total = random.Random(seed), STEPS_A_ROUND * len(faults) * BATCH
    write_shards(root / "data", SHARDS)
    expected = finish(start(root, "undisturbed", 1, 1, total))
    if expected != [0]:
        raise Failed(f"the undisturbed run ended with {expected}")
    rounds = []
    with progress(len(faults), "round", "chaos") as bar:
        for fault in [*chance.sample(faults, len(faults)), "none"]:
            rounds.append(one_round(root, fault, chance, total))
            bar.update()
    compare(root / "undisturbed", root / "disturbed", total)
    return rounds


def one_round(root: Path, fault: str, chance: random.Random, total: int) -> Round:
    """Start the run, break it, and look at what is left."""
    run_dir, before = root / "disturbed", position(root / "disturbed")
    ranks = chance.choice([2, 3]) if fault in ("kill_one", "stop_one") else chance.choice([1, 2, 3])
    out = Round(fault, ranks, chance.choice([0, 1, 2, 3]), checkpointed(run_dir))
    full = chance.randrange(ranks) if fault == "disk_full" else -1
    processes = start(root, "disturbed", ranks, out.stage, total, full, cached=fault in CACHED)
    try:
        FAULTS.get(fault, leave_alone)(processes, run_dir, before, chance)
        out.codes = finish(processes)
    except Failed as error:
        raise Failed(f"{fault} on {ranks} ranks at stage {out.stage}: {error}") from None
    finally:
        for p in processes:
            p.kill()
            p.wait()
    out.reached = position(run_dir)
    if fault == "none" and out.codes != [0] * ranks:
        raise Failed(f"left alone at last, the run ended with {out.codes}")
    for path in listed(run_dir / "checkpoints"):
        try:
            Checkpoint.read(path).verify()
        except Damaged as error:
            raise Failed(f"after {fault}: {error}") from None
    return out


def start(root: Path, name: str, ranks: int, stage: int, total: int, full: int = -1, cached: bool = False) -> Ranks:
    """The run on so many ranks; rank `full` has no room for large files. cached: the data are read as remote ones."""
    data = [f"data.path=file://{root / 'data'}", f"data.cache_dir={root / CACHE}"]
    data = data if cached else [f"data.path={root / 'data'}"]
    arguments = [*SETTINGS, f"run_dir={root / name}", *data, f"train.total_samples={total}"]
    processes = start_ranks(
        ranks, "-m", "ldt", "train", *arguments, f"engine.zero_stage={stage}", "--quiet", stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, preexec_fn=drop_overrides,
    )  # fmt: skip
    if full >= 0:
        resource.prlimit(processes[full].pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    return processes


def finish(processes: Ranks, patience: float = PATIENCE) -> list[int]:
    """Exit codes; ranks that outlive a killed one for too long are a broken promise."""
    try:
        return [p.wait(timeout=patience) for p in processes]
    except subprocess.TimeoutExpired:
        raise Failed(f"processes hung for {patience:g} s: {[p.poll() for p in processes]}") from None


# -------------------------------------------------------------------------------------------------------------- faults


def leave_alone(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """Nothing."""


def kill_one(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """kill -9 of a random rank at a random step; the others must end by themselves."""
    wait_for_steps(processes, run_dir, before, chance.randint(1, 10))
    chance.choice(processes).kill()


def kill_all(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """kill -9 of all ranks at a random step, as when power fails."""
    wait_for_steps(processes, run_dir, before, chance.randint(1, 10))
    for p in processes:
        p.kill()


def kill_in_save(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """kill -9 of a random rank as soon as there is a half-written checkpoint."""
    wait_for_steps(processes, run_dir, before, 1)  # what an earlier round left half-written is gone by then
    wait_for(processes, lambda: any(run_dir.glob("checkpoints/.*.tmp")))
    chance.choice(processes).kill()


def kill_in_rename(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """kill -9 of rank 0 as soon as a manifest is written, just before or after the rename."""
    wait_for_steps(processes, run_dir, before, 1)
    wait_for(processes, lambda: any(run_dir.glob("checkpoints/.*.tmp/manifest.json")))
    processes[0].kill()


def kill_in_load(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """kill -9 of a random rank between its start and its first step; the launcher ends the others, as they all do."""
    wait_for(processes, lambda: (run_dir / "owner.json").exists())
    time.sleep(chance.uniform(0, 1.5))
    chance.choice(processes).kill()
    time.sleep(1)
    for p in processes:
        p.kill()


def stop_one(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """SIGSTOP of a random rank: the others must give up, then the launcher ends it."""
    wait_for_steps(processes, run_dir, before, chance.randint(1, 10))
    stopped = chance.choice(processes)
    stopped.send_signal(signal.SIGSTOP)
    finish([p for p in processes if p is not stopped])
    stopped.kill()


def disk_full(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """One rank can't write its share: saves fail, training goes on, and is killed later."""
    wait_for_steps(processes, run_dir, before, 2 * SAVE_STEPS)
    for p in processes:
        p.kill()


def terminate(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """SIGTERM to one rank: all save and leave with 75."""
    ask_to_stop(signal.SIGTERM, processes, run_dir, before, chance)


def hang_up(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """SIGHUP to one rank, as from a terminal that is closed: all save and leave with 75."""
    ask_to_stop(signal.SIGHUP, processes, run_dir, before, chance)


def ask_to_stop(
    number: signal.Signals, processes: Ranks, run_dir: Path, before: int, chance: random.Random, steps: int = 10
) -> None:
    wait_for_steps(processes, run_dir, before, chance.randint(1, steps))
    chance.choice(processes).send_signal(number)
    codes = finish(processes)
    if set(codes) - {0, 75}:
        raise Failed(f"a stop request ended with {codes}")


def pause(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """All ranks stand still for longer than any watchdog waits, as a suspended job does; then they go on."""
    wait_for_steps(processes, run_dir, before, chance.randint(1, 5))
    for p in processes:
        p.send_signal(signal.SIGSTOP)
    time.sleep(4 * STALL)
    for p in processes:
        p.send_signal(signal.SIGCONT)
    ask_to_stop(signal.SIGTERM, processes, run_dir, position(run_dir), chance, steps=3)


def move_checkpoints(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """Somebody moves the checkpoints to another disk and leaves links, while the run goes on; then all are killed."""
    wait_for_steps(processes, run_dir, before, SAVE_STEPS + 1)
    for path in listed(run_dir / "checkpoints"):
        elsewhere = run_dir.parent / "elsewhere" / f"{path.name}-{before}"
        elsewhere.parent.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # it was too old to keep just now
            path.rename(elsewhere)
            path.symlink_to(elsewhere)
    wait_for_steps(processes, run_dir, before, 2 * SAVE_STEPS + 2)
    for p in processes:
        p.kill()


def lose_cache(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """Somebody cleans the cache's directory up, again and again, while shards are downloaded and read."""
    goal = before + chance.randint(3, 8) * BATCH

    def cleaned() -> bool:
        shutil.rmtree(run_dir.parent / CACHE, ignore_errors=True)
        time.sleep(chance.uniform(0, 0.3))
        return position(run_dir) >= goal

    wait_for(processes, cleaned)
    end_of_data_fault(processes, run_dir, chance)


def spoil_cache(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """The disk under the cache has damaged the copies of all shards since the last start."""
    for path in (run_dir.parent / CACHE).glob("*"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
    wait_for_steps(processes, run_dir, before, chance.randint(1, 8))
    end_of_data_fault(processes, run_dir, chance)


def close_checkpoints(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """Nobody may write into checkpoints/ for a while: saves fail, training goes on, and saves again afterwards."""
    wait_for_steps(processes, run_dir, before, 1)
    directory = run_dir / "checkpoints"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o500)
    wait_for_steps(processes, run_dir, before, 2 * SAVE_STEPS)
    directory.chmod(0o755)
    end_of_data_fault(processes, run_dir, chance)


def close_data(processes: Ranks, run_dir: Path, before: int, chance: random.Random) -> None:
    """Nobody may read the shards from some moment on, before or after they were opened."""
    shards, goal = run_dir.parent / "data", before + chance.randint(1, 8) * BATCH
    time.sleep(chance.uniform(0, 8))
    shards.chmod(0)
    try:
        wait_for(processes, lambda: position(run_dir) >= goal)
        if all(p.poll() is None for p in processes):
            chance.choice(processes).send_signal(signal.SIGTERM)
        finish(processes)
    finally:
        shards.chmod(0o755)


def end_of_data_fault(processes: Ranks, run_dir: Path, chance: random.Random) -> None:
    """What data or disks do that come back must end nothing with code 2, which is final."""
    if all(p.poll() is None for p in processes):
        chance.choice(processes).send_signal(signal.SIGTERM)
    codes = finish(processes)
    if set(codes) - {0, 75}:
        raise Failed(f"a fault that passes ended with {codes}")


FAULTS: dict[str, Callable[[Ranks, Path, int, random.Random], None]] = {
    f.__name__: f
    for f in (
        kill_one,
        kill_all,
        kill_in_save,
        kill_in_rename,
        kill_in_load,
        stop_one,
        disk_full,
        terminate,
        hang_up,
        pause,
        move_checkpoints,
        lose_cache,
        spoil_cache,
        close_checkpoints,
        close_data,
    )
}
CACHED = ("lose_cache", "spoil_cache")
"""Faults of rounds whose data are read through a cache."""


def wait_for_steps(processes: Ranks, run_dir: Path, before: int, steps: int) -> None:
    """Until the run has logged so many steps more than it ever had, or has ended."""
    wait_for(processes, lambda: position(run_dir) >= before + steps * BATCH)


def wait_for(processes: Ranks, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Until it holds, or a process has ended."""
    end = time.monotonic() + patience
    while not condition() and all(p.poll() is None for p in processes):
        if time.monotonic() > end:
            raise Failed(f"no progress for {patience:g} s")
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------------------ findings


def position(run_dir: Path) -> int:
    """Samples seen by the last line of the log."""
    return max((r["samples_seen"] for r in read_jsonl(run_dir / "metrics.jsonl")), default=0)


def checkpointed(run_dir: Path) -> int:
    """Samples seen by the newest checkpoint."""
    return max((int(p.name) for p in listed(run_dir / "checkpoints")), default=0)


def compare(undisturbed: Path, disturbed: Path, total: int) -> None:
    """`Failed` unless both logs are of the same run."""
    expected, found = (list(read_jsonl(p / "metrics.jsonl")) for p in (undisturbed, disturbed))
    clock = list(range(BATCH, total + 1, BATCH))
    if [r["samples_seen"] for r in expected] != clock:
        raise Failed("the undisturbed run's log is not whole")
    if [r["samples_seen"] for r in found] != clock:
        raise Failed(f"steps are missing or double: {len(found)} lines for {len(clock)} steps")
    for a, b in zip(expected, found, strict=True):
        if a["digest"] != b["digest"]:
            raise Failed(f"at {a['samples_seen']} samples the digest is {b['digest']} instead of {a['digest']}")
    for a, b in zip(expected[:EXACT_STEPS], found, strict=False):
        if abs(a["loss"] - b["loss"]) > DIGITS * abs(a["loss"]):
            raise Failed(f"at {a['samples_seen']} samples the loss is {b['loss']} instead of {a['loss']}")


if __name__ == "__main__":
    run_tool(main)
