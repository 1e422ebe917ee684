"""Small checkpoints, written as docs/checkpoints.md says and by none of ldt's own writers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from ldt.data.latent_spec import LatentSpec

SPEC = LatentSpec((4, 2, 2), ["a", "b", "c"], [0.0] * 4, [1.0] * 4, "", "", 0, 0)
Tensors = dict[str, dict[str, torch.Tensor]]
"""By kind and by the name of the parameter, in its shape."""


def write_checkpoint(path: Path, samples_seen: int, tensors: Tensors, files: int = 1, **changes: Any) -> Path:
    """A whole checkpoint, each parameter cut into equal ranges over the files, with the manifest's keys changed."""
    path.mkdir(parents=True)
    shapes = {name: list(tensor.shape) for name, tensor in next(iter(tensors.values())).items()}
    entries = {}
    for file in range(files):
        ranges, kept = {}, {}
        for name in shapes:
            pieces = {kind: tensors[kind][name].flatten().tensor_split(files) for kind in tensors}
            before = sum(len(piece) for piece in next(iter(pieces.values()))[:file])
            ranges[name] = [before, len(next(iter(pieces.values()))[file])]
            kept |= {f"{kind}/{name}": pieces[kind][file].clone() for kind in tensors}
        place = path / f"rank-{file:05d}-of-{files:05d}.safetensors"
        save_file(kept, place)
        content = place.read_bytes()
        entries[place.name] = {"bytes": len(content), "xxh64": xxhash.xxh64(content).hexdigest(), "ranges": ranges}
    manifest = {
        "format": "ldt-checkpoint",
        "version": 3,
        "parameters": shapes,
        "tensors": list(tensors),
        "absent": {},
        "averages": {},
        "files": entries,
        "optimizer_steps": 7,
        "progress": {"samples_seen": samples_seen, "data_fingerprint": "data", "skipped": [], "attempt": 0},
        "sampling": asdict(SPEC),
        "config": {"model": {}, "objective": {}},
        "rng_version": 3,
        "written_by": {"world_size": files, "zero_stage": 1, "ldt": "0"},
    }
    seal(path, manifest | changes)
    return path


def seal(path: Path, manifest: Any) -> None:
    """Write a manifest and its hash."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.xxh64").write_text(xxhash.xxh64(text).hexdigest())
