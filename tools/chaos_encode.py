"""Break encodings again and again and check that what is called complete holds the images that are there.

    python tools/chaos_encode.py --rounds 20 --seed 1 --json chaos_encode.json

Each round encodes some images on a random number of ranks and does one of FAULTS to them. The command is then started
again. If it ends well, the shards must be those that an undisturbed encoding of the present images gives, bit for bit;
if it refuses the output because the images are others now, a new output must be those. Nothing else may happen.
"""

import contextlib
import io
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from capabilities import drop_overrides
from chaos import Failed, Ranks, command, finish, wait_for
from PIL import Image
from program import run_tool
from ranks import start_ranks

from ldt import cli
from ldt.data.shard_files import VALIDATION
from ldt.data.shards import open_shards
from ldt.log import progress

CLASSES, IMAGES, SIZE = ["ant", "bee", "cat"], 240, 32
SHARD_SAMPLES, PATIENCE = 8, 600.0
REFUSED = ("other settings", "other sizes")  # what is said of images that have changed


@dataclass
class Round:
    """What was done in one round, and what it came to: `codes` of the ranks, then of the command afterwards."""

    fault: str
    ranks: int
    codes: list[int] = field(default_factory=list)
    again: int = 0


def main() -> int:
    """Run the campaign; returns the exit code."""
    return command(__doc__, FAULTS, campaign, "every complete output holds the images that are there, each once")


def campaign(root: Path, faults: Sequence[str], seed: int) -> list[Round]:
    """Disturb an encoding by each fault, in random order; `Failed` if a wrong set of images is called complete."""
    chance, rounds = random.Random(seed), []
    with progress(len(faults), "round", "chaos") as bar:
        for number, fault in enumerate(chance.sample(faults, len(faults))):
            rounds.append(one_round(root / str(number), fault, chance))
            bar.update()
    return rounds


def one_round(root: Path, fault: str, chance: random.Random) -> Round:
    """Encode, break it, start again, and compare with an undisturbed encoding."""
    images, out = root / "images", Round(fault, chance.choice([1, 2, 3]))
    for i in range(IMAGES):
        write_image(images / CLASSES[i % len(CLASSES)] / f"{i:04d}.png", chance)
    arguments = settings(root, "out")
    processes = start_ranks(
        out.ranks, "-m", "ldt", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=drop_overrides,
    )  # fmt: skip
    try:
        shards = chance.randint(0, IMAGES // SHARD_SAMPLES)
        wait_for(processes, lambda: len(list((root / "out").rglob("shard-*.tar"))) >= shards, PATIENCE)
        FAULTS[fault](processes, images, chance)
        out.codes = finish(processes, PATIENCE)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for path in images.rglob("*"):
        path.chmod(0o755)
    again = subprocess.run([sys.executable, "-m", "ldt", *arguments], capture_output=True, text=True)
    out.again = again.returncode
    name = "out" if again.returncode == 0 else "new"
    if again.returncode and not any(words in again.stderr for words in REFUSED):
        raise Failed(f"{fault} on {out.ranks} ranks: started again it says {again.stderr[-300:]}")
    for undisturbed in {"expected", name} - {"out"}:
        with contextlib.redirect_stdout(io.StringIO()):
            if cli.main(settings(root, undisturbed)) != 0:
                raise Failed(f"{fault}: an undisturbed encoding fails")
    if contents(root / name) != contents(root / "expected"):
        raise Failed(f"{fault} on {out.ranks} ranks: {name} is complete, but not of the images that are there")
    return out


def settings(root: Path, name: str) -> list[str]:
    """The command line of an encoding into `name`."""
    keys = {"images.path": root / "images", "images.size": SIZE, "autoencoder": "embedded:fashion_mnist"}
    keys |= {"output": root / name, "shard_samples": SHARD_SAMPLES, "batch": 4, "validation_fraction": 0.1}
    return ["encode", *(f"{key}={value}" for key, value in keys.items()), "--quiet"]


def contents(directory: Path) -> list[tuple[str, list[int]]]:
    """Fingerprints and class counts of both splits, each shard read and checked."""
    found = []
    for path in (directory, directory / VALIDATION):
        split = open_shards(path)
        for shard in range(len(split.manifest.counts)):
            split.check(shard)
        found.append((split.manifest.fingerprint, list(split.manifest.class_counts)))
    return found


def write_image(path: Path, chance: random.Random, size: int = 28) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(chance.getrandbits(32)).integers(0, 255, (size, size), np.uint8)
    Image.fromarray(noise).save(path)


# -------------------------------------------------------------------------------------------------------------- faults


def kill_one(processes: Ranks, images: Path, chance: random.Random) -> None:
    """kill -9 of a random rank; a launcher would end the others."""
    chance.choice(processes).kill()
    time.sleep(0.5)
    for p in processes:
        p.kill()


def interrupt(processes: Ranks, images: Path, chance: random.Random) -> None:
    """Ctrl-C."""
    for p in processes:
        p.send_signal(signal.SIGINT)


def remove_images(processes: Ranks, images: Path, chance: random.Random) -> None:
    """Some images are deleted; then all ranks are killed."""
    for path in some(images, chance):
        path.unlink()
    kill_one(processes, images, chance)


def exchange_images(processes: Ranks, images: Path, chance: random.Random) -> None:
    """As many others take the place of some images, under new names; then all ranks are killed."""
    for path in some(images, chance):
        path.unlink()
        write_image(path.with_name(f"new_{path.name}"), chance)
    kill_one(processes, images, chance)


def alter_images(processes: Ranks, images: Path, chance: random.Random) -> None:
    """Some files get another content of another size under their own names; then all ranks are killed."""
    for path in some(images, chance):
        write_image(path, chance, 24)
    kill_one(processes, images, chance)


def alter_while_encoding(processes: Ranks, images: Path, chance: random.Random) -> None:
    """The same, but the encoding goes on over it and may complete."""
    for path in some(images, chance):
        write_image(path, chance, 24)


def close_images(processes: Ranks, images: Path, chance: random.Random) -> None:
    """Some images may not be read any more: the encoding ends with a sentence, and goes on once they may."""
    for path in some(images, chance):
        path.chmod(0)


def close_directory(processes: Ranks, images: Path, chance: random.Random) -> None:
    """A whole class may not be read for a while."""
    (images / chance.choice(CLASSES)).chmod(0)


def some(images: Path, chance: random.Random) -> list[Path]:
    return chance.sample(sorted(images.rglob("*.png")), 5)


FAULTS: dict[str, Callable[[Ranks, Path, random.Random], None]] = {
    f.__name__: f
    for f in (
        kill_one,
        interrupt,
        remove_images,
        exchange_images,
        alter_images,
        alter_while_encoding,
        close_images,
        close_directory,
    )
}


if __name__ == "__main__":
    run_tool(main)
