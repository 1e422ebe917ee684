"""Elastic checkpoints: written by any number of ranks at any ZeRO stage, read by any other, or by one process alone.

A checkpoint is a directory `<samples_seen>` with one safetensors file a rank and a manifest. Tensors are
one-dimensional slices of flattened parameters (`master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`, `ema/<name>`),
and the manifest says which elements each file holds, so resharding is only a matter of reading the right slices.
docs/checkpoints.md is the specification.

Writing is atomic: every rank writes and syncs its file under a temporary name, the manifest comes last, and a rename
commits. A directory without a manifest, or whose bytes differ from the manifest's hashes, is not a checkpoint.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from ldt import __version__, rng
from ldt.claims import pinned
from ldt.config import from_dict
from ldt.diffusion.objectives import Objective, ObjectiveConfig
from ldt.dist import World, all_gather, barrier, broadcast
from ldt.errors import InputError
from ldt.log import get_logger
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.partition import MOMENTS, Fragment, Partition

logger = get_logger(__name__)

FORMAT, VERSION = "ldt-checkpoint", 1
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.xxh64"
CHUNK = 1 << 24


@dataclass
class Sampling:
    """What it takes to make images from a checkpoint without the data it was trained on."""

    latent_shape: tuple[int, int, int]
    classes: list[str]
    mean_C: list[float]
    std_C: list[float]
    autoencoder: str
    autoencoder_hash: str
    image_size: int
    image_channels: int


@dataclass
class Progress:
    """The state of a run besides its tensors."""

    samples_seen: int
    data_fingerprint: str
    skipped: list[int]
    attempt: int


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the message names the file."""


# ---------------------------------------------------------------------------------------------------------- writing


def save(
    root: Path,
    partition: Partition,
    ema: list[Tensor],
    progress: Progress,
    sampling: Sampling,
    config: dict[str, Any],
    world: World,
) -> Path:
    """Write `root/<samples_seen>` together with all ranks; returns its path when it is complete."""
    final = root / f"{progress.samples_seen:012d}"
    temporary = root / f".{final.name}.tmp"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    entry = write_safetensors(temporary / name, dict(_owned_tensors(partition, ema)))
    entry["ranges"] = {f.name: [f.start, f.count] for f in partition.owned}
    entries = all_gather({name: entry})
    if world.rank == 0:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "rng_version": rng.VERSION,
            "progress": asdict(progress),
            "optimizer_steps": partition.optimizer_steps(),
            "sampling": asdict(sampling),
            "config": config,
            "parameters": {k: list(v) for k, v in partition.shapes().items()},
            "tensors": ["master", *MOMENTS, "ema"],
            "files": {k: v for e in entries for k, v in e.items()},
            "written_by": {"world_size": world.size, "zero_stage": partition.stage, "time": time.time(), **versions()},
        }
        _commit(temporary, final, manifest)
    barrier()
    return final


def _owned_tensors(partition: Partition, ema: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for f, average in zip(partition.owned, ema, strict=True):
        yield f"master/{f.name}", f.master
        for kind, value in partition.moments(f).items():
            yield f"{kind}/{f.name}", value
        yield f"ema/{f.name}", average


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1).encode()
    _write_synced(temporary / MANIFEST_HASH, xxhash.xxh64(text).hexdigest().encode())
    _write_synced(temporary / MANIFEST, text)
    sync_directory(temporary)
    if final.exists():  # a resumed run comes by here again; what stands there is whole or set aside by now
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(final.parent)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write float32 1-D tensors in the safetensors format, synced to disk; returns {"bytes", "xxh64"} of the file."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.ndim == 1, (key, tensor.dtype, tensor.shape)
        size = 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = xxhash.xxh64()
    with path.open("wb") as f:
        parts: list[bytes | memoryview] = [len(head).to_bytes(8, "little"), head, *map(_bytes, tensors.values())]
        for part in parts:
            digest.update(part)
            f.write(part)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": 8 + len(head) + offset, "xxh64": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    array: np.ndarray = tensor.detach().cpu().contiguous().numpy()
    return array.data.cast("B") if array.size else memoryview(b"")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def versions() -> dict[str, str]:
    """The software that wrote this."""
    return {
        "ldt": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------------------- reading


def listed(root: Path) -> list[Path]:
    """Complete-looking checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a checkpoint directory; `Damaged` if it is missing or altered."""
    try:
        text = (path / MANIFEST).read_bytes()
        expected = (path / MANIFEST_HASH).read_text().strip()
    except OSError as error:
        raise Damaged(f"{path} has no readable {Path(error.filename).name}; it was not written to the end") from None
    except UnicodeDecodeError:
        raise Damaged(f"{path / MANIFEST_HASH} is not a hash") from None
    if xxhash.xxh64(text).hexdigest() != expected:
        raise Damaged(f"{path / MANIFEST} differs from its hash")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not an ldt checkpoint; its manifest says format {manifest.get('format')!r}")
    if manifest["version"] > VERSION:
        raise InputError(
            f"checkpoint {path} has format version {manifest['version']}; this ldt reads up to {VERSION}: upgrade ldt"
        )
    return manifest


def verify_file(path: Path, entry: dict[str, Any]) -> None:
    """`Damaged` unless the file has the size and hash that the manifest gives."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes instead of {entry['bytes']}")
        digest = xxhash.xxh64()
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise Damaged(f"{path} can't be read: {error.strerror}") from None
    if digest.hexdigest() != entry["xxh64"]:
        raise Damaged(f"{path} differs from its hash in the manifest")


def verify(path: Path, world: World | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose bytes are right; the ranks of `world` share the reading."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    problem, manifest = "", {}
    try:
        manifest = read_manifest(path)
        for name, entry in list(manifest["files"].items())[rank::size]:
            verify_file(path / name, entry)
    except Damaged as error:
        problem = str(error)
    problems = [p for p in (all_gather(problem) if world else [problem]) if p]
    if problems:
        raise Damaged(problems[0])
    return manifest


def newest_whole(root: Path, world: World) -> Path | None:
    """The newest undamaged checkpoint, the same on all ranks; None if there is none at all.

    A damaged newer one is named and set aside as `<name>.damaged`. If all are damaged this is an error, never a fresh
    start.
    """
    candidates = broadcast(listed(root))
    for path in reversed(candidates):
        try:
            verify(path, world)
            return path
        except Damaged as error:
            logger.warning("checkpoint damaged, set aside as %s.damaged: %s", path.name, error)
            barrier()
            if world.rank == 0:
                path.rename(path.with_name(f"{path.name}.damaged"))
            barrier()
    aside = broadcast(sorted(root.glob("*.damaged"))) if root.is_dir() or candidates else []
    if candidates or aside:
        raise InputError(
            f"no checkpoint under {root} is whole ({len(aside)} damaged); restore one of them, "
            "or remove the directory to start again from nothing"
        )
    return None


def remove_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and those that somebody has claimed or waits for.

    Each is renamed first, so that none is ever seen half deleted.
    """
    for path in listed(root)[: -keep or None]:
        if pinned(path):
            continue
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)
        shutil.rmtree(doomed)


class Reader:
    """Slices of a checkpoint's tensors, wherever they are."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.files = [
            (entry["ranges"], safe_open(path / name, framework="pt")) for name, entry in manifest["files"].items()
        ]

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of flattened `kind/name`: float32, 1-D."""
        out = torch.empty(count, dtype=torch.float32)
        filled = 0
        for ranges, file in self.files:
            if name not in ranges:
                continue
            low, high = ranges[name][0], sum(ranges[name])
            a, b = max(low, start), min(high, start + count)
            if a < b:
                out[a - start : b - start] = file.get_slice(f"{kind}/{name}")[a - low : b - low]
                filled += b - a
        if filled != count:
            raise Damaged(f"{kind}/{name} has {filled} of the elements {start} to {start + count}")
        return out

    def full(self, kind: str) -> dict[str, Tensor]:
        """All parameters in their shapes."""
        shapes = self.manifest["parameters"]
        return {k: self.read(kind, k, 0, int(np.prod(s, dtype=np.int64))).view(s) for k, s in shapes.items()}


def restore(path: Path, partition: Partition, ema: list[Tensor]) -> Progress:
    """Fill the engine and the averages from a checkpoint of the same model (collective)."""
    manifest = read_manifest(path)
    _check_shapes(path, manifest["parameters"], partition)
    reader = Reader(path, manifest)
    partition.materialise_moments(manifest["optimizer_steps"])

    def read(kind: str, f: Fragment) -> Tensor:
        return reader.read(kind, f.name, f.start, f.count)

    for f in partition.whole():
        f.master.copy_(read("master", f))
        for kind, value in partition.moments(f).items():
            value.copy_(read(kind, f))
    for f, average in zip(partition.owned, ema, strict=True):
        average.copy_(read("ema", f))
    partition.publish()
    return Progress(**manifest["progress"])


def start_from(path: Path, partition: Partition, ema: list[Tensor]) -> None:
    """Weights and averages ← the averaged weights of another run's checkpoint; a new optimizer (collective)."""
    try:
        manifest = verify(path)
    except Damaged as error:
        raise InputError(f"train.init_from={path} is damaged: {error}; give another checkpoint") from None
    _check_shapes(path, manifest["parameters"], partition)
    reader = Reader(path, manifest)
    for f in partition.whole():
        f.master.copy_(reader.read("ema", f.name, f.start, f.count))
    for f, average in zip(partition.owned, ema, strict=True):
        average.copy_(f.master)
    partition.publish()


def _check_shapes(path: Path, saved: dict[str, list[int]], partition: Partition) -> None:
    ours = {k: list(v) for k, v in partition.shapes().items()}
    for name in [*ours, *saved]:
        if saved.get(name) != ours.get(name):
            raise InputError(
                f"checkpoint {path} holds another model: parameter {name} has shape {saved.get(name, 'none')} there "
                f"and {ours.get(name, 'none')} here; use the config it was trained with, or another run_dir"
            )


# --------------------------------------------------------------------------------------- reading without an engine


@dataclass
class Loaded:
    """A denoiser ready for sampling."""

    denoiser: nn.Module
    objective: Objective
    sampling: Sampling
    config: dict[str, Any]
    samples_seen: int
    path: Path
    hash: str


def newest(run_dir: Path) -> Path:
    """The newest complete checkpoint of a run directory."""
    candidates = [p for p in listed(run_dir / "checkpoints") if (p / MANIFEST).exists()]
    if not candidates:
        raise InputError(f"run {run_dir} has no complete checkpoint yet; train first, or give the path of a checkpoint")
    return candidates[-1]


def resolve(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run directory."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory or a checkpoint in it")
    return path if (path / MANIFEST).exists() else newest(path)


def load_denoiser(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Loaded:
    """The denoiser of a run's newest checkpoint, or of one checkpoint, without data or process group.

    `weights`: `ema` or `master`. The files read are checked against their hashes.
    """
    directory = resolve(Path(path))
    try:
        manifest = verify(directory)
        if weights not in manifest["tensors"]:
            raise InputError(f"checkpoint {directory} holds no {weights} weights, but {', '.join(manifest['tensors'])}")
        tensors = Reader(directory, manifest).full(weights)
    except Damaged as error:
        raise InputError(f"checkpoint {directory} is damaged: {error}; use the one before it") from None
    config = manifest["config"]
    sampling = Sampling(**manifest["sampling"])
    denoiser = build(from_dict(ModelConfig, config["model"]), sampling.latent_shape, len(sampling.classes), seed=0)
    denoiser.load_state_dict(tensors, strict=False)  # fixed positions are rebuilt, not stored
    return Loaded(
        denoiser=denoiser.to(device).eval(),
        objective=Objective(from_dict(ObjectiveConfig, config["objective"])),
        sampling=sampling,
        config=config,
        samples_seen=manifest["progress"]["samples_seen"],
        path=directory,
        hash=(directory / MANIFEST_HASH).read_text(),
    )
