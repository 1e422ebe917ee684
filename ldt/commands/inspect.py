"""What a path holds and whether it is whole: a directory of latent shards, a checkpoint, or a run with checkpoints.

Exit codes: 0 whole, 1 damaged or unfinished (what is wrong is printed), 2 not one of ours.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldt import log
from ldt.checkpoint.manifest import Damaged, verify
from ldt.config_fields import required
from ldt.data.shards import open_shards
from ldt.data.shards.manifest import RECIPE
from ldt.data.shards.reader import LatentShards
from ldt.data.shards.summary import is_shard_directory, latents_to_show, summarize
from ldt.errors import InputError
from ldt.image_files import class_grid, write_picture
from ldt.models.autoencoder import Autoencoder

logger = log.get_logger(__name__)
WHOLE, DAMAGED = 0, 1


@dataclass
class InspectJob:
    """`path`: what to look at; `grid`: a PNG to draw decoded samples into; `images`: how many."""

    path: str = required()
    grid: str = ""
    images: int = 64


def run(config: InspectJob) -> int:
    """Look; returns the exit code."""
    path = Path(config.path)
    if is_shard_directory(path):
        return _inspect_shards(config)
    if path.parent.name == "checkpoints" and path.is_dir():
        return _inspect_checkpoint(path)
    if (path / "checkpoints").is_dir():
        checkpoints = sorted(p for p in (path / "checkpoints").iterdir() if p.is_dir())
        return max((_inspect_checkpoint(p) for p in checkpoints), default=WHOLE)
    raise InputError(f"{path} holds neither latent shards nor checkpoints; give the output of `ldt encode` or a run")


def _inspect_checkpoint(path: Path) -> int:
    try:
        manifest = verify(path)
    except Damaged as error:
        print(f"damaged: {error}")
        return DAMAGED
    written, numbers = manifest["written_by"], [math.prod(s) for s in manifest["parameters"].values()]
    facts = {
        "samples seen": manifest["progress"]["samples_seen"],
        "parameters": sum(numbers),
        "tensors": ", ".join(manifest["tensors"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "written by": f"{written['world_size']} ranks at ZeRO stage {written['zero_stage']}, ldt {written['ldt']}",
    }
    facts |= _data_of(manifest["config"].get("data", {}))
    for name, value in facts.items():
        print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value}")
    print(f"whole: {path}")
    return WHOLE


def _data_of(data: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint was trained on, as its config tells: paths, and shares of several sources."""
    sources = data.get("sources") or {}
    whole = sum(source["weight"] for source in sources.values())
    shares = {f"source {name}": f"{100 * s['weight'] / whole:.2f} % {s['path']}" for name, s in sorted(sources.items())}
    return shares or {"data": data.get("path", "")}


def _inspect_shards(config: InspectJob) -> int:
    try:
        shards = open_shards(config.path)
    except InputError as error:
        print(f"{'unfinished' if (Path(config.path) / RECIPE).exists() else 'damaged'}: {error}")
        return DAMAGED
    summary = summarize(shards)
    for name, value in summary.facts.items():
        print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value}")
    for problem in summary.problems:
        print(f"damaged: {problem}")
    if summary.problems:
        return DAMAGED
    if config.grid:
        _draw(shards, config)
        print(f"decoded samples: {config.grid}")
    print(f"whole: {config.path}")
    return WHOLE


def _draw(shards: LatentShards, config: InspectJob) -> None:
    manifest = shards.manifest
    autoencoder = Autoencoder.load(manifest.autoencoder)
    if autoencoder.hash != manifest.autoencoder_hash:
        raise InputError(f"autoencoder {manifest.autoencoder} is not the one that {config.path} was encoded with")
    latent_BCHW, label_B = latents_to_show(shards, config.images)
    image_BHWC = autoencoder.decode(torch.from_numpy(latent_BCHW.copy()))
    write_picture(Path(config.grid), class_grid(image_BHWC.cpu().numpy(), label_B))
