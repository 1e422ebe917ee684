"""What this version writes, for later versions to read: `python tools/make_compat.py tests/data/NAME`.

Shards in both formats, a checkpoint that two ranks wrote, what `ldt sample` draws of it, and the log of the run that
went on from there. tests/test_compat.py reads every directory under tests/data; old ones stay as they are.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from program import run_tool

from ldt.data.images import EMBEDDED
from ldt.data.images.open import open_images
from ldt.errors import InputError
from ldt.files import making
from ldt.log import read_jsonl

ENCODE = ["images.path=images", "images.size=32", "images.fit=pad", "autoencoder=embedded:fashion_mnist"]
ENCODE += ["shard_samples=6", "flips=true", "dtype=fp16"]
TRAIN = ["run_dir=run", "data.path=tar", "data.window=8", "data.streams=2", "model.width=8", "model.depth=2"]
TRAIN += ["model.heads=1", "model.mlp_ratio=1", "train.global_batch=10", "optimizer.lr=1e-2"]
TRAIN += ["optimizer.warmup_samples=10", "log.every_samples=10", "checkpoint.every_samples=20", "checkpoint.keep=9"]
SAMPLE = ["images=6", "steps=4", "guidance=1.5", "block=6", "format=npz", "output=images.npz"]
BEFORE, AFTER = 40, 60
"""Samples seen at the checkpoint, and at the end of the log."""


def main() -> None:
    final = Path(sys.argv[1])
    if final.exists():
        raise InputError(f"{final} exists; give a directory that does not")
    with tempfile.TemporaryDirectory() as name, making(final) as target:
        work = Path(name)
        write_images(work / "images", 12)
        for format in ("tar", "mds"):
            ldt(work, "encode", *ENCODE, f"output={format}", f"format={format}")
            shutil.copytree(work / format, target / format)
        ldt(work, "train", *TRAIN, f"train.total_samples={AFTER}", "engine.zero_stage=1", ranks=2)
        checkpoint = Path("checkpoints") / f"{BEFORE:012d}"
        shutil.copytree(work / "run" / checkpoint, target / "run" / checkpoint)
        ldt(work, "sample", str(Path("run") / checkpoint), *SAMPLE)
        shutil.copy(work / "images.npz", target)
        steps = [{k: r[k] for k in ("samples_seen", "loss", "digest")} for r in read_jsonl(work / "run/metrics.jsonl")]
        (target / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")


def write_images(path: Path, count: int) -> None:
    source = open_images(EMBEDDED)
    chosen = [i for i in range(len(source)) if source.label(i) < 3][:count]
    for i in chosen:
        folder = path / source.classes[source.label(i)]
        folder.mkdir(parents=True, exist_ok=True)
        source.image(i).save(folder / f"{i:05d}.png")


def ldt(work: Path, *words: str, ranks: int = 1) -> None:
    """Run a command in a directory, so that no path of this machine gets into its files."""
    launcher = ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else [sys.executable]
    subprocess.run([*launcher, "-m", "ldt", *words], cwd=work, check=True)


if __name__ == "__main__":
    run_tool(main)
