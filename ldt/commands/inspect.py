"""What a path holds and whether it is whole: latent shards, a checkpoint, a run with checkpoints, an exported model.

Exit codes: 0 whole, 1 damaged or unfinished (what is wrong is printed), 2 not one of ours.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldt import log
from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.load import read_exported
from ldt.checkpoint.manifest import MANIFEST, MODEL, Damaged
from ldt.config_fields import path_field, required_path_field
from ldt.data.shard_files import BUCKETS, RECIPE, VALIDATION
from ldt.data.shards import BucketShards, open_shards
from ldt.data.shards.buckets import check_buckets, read_buckets
from ldt.data.shards.reader import LatentShards
from ldt.data.shards.summary import is_shard_directory, latents_to_show, summarize
from ldt.errors import InputError, on_one_line
from ldt.image_files import class_grid, write_picture
from ldt.models.autoencoder import Autoencoder

logger = log.get_logger(__name__)
WHOLE, DAMAGED = 0, 1


@dataclass
class InspectJob:
    """`path`: what to look at; `grid`: a PNG to draw decoded samples into; `images`: how many."""

    path: str = required_path_field()
    grid: str = path_field()
    images: int = 64


def run(config: InspectJob) -> int:
    """Say what the path holds; returns 0 if it is whole, 1 if it is damaged and 2 if it is nothing of ldt's."""
    path = Path(config.path)
    if (path / BUCKETS).exists():
        return _inspect_buckets(config)
    if is_shard_directory(path):
        return _inspect_shards(config)
    if (path / MODEL).is_file():
        return _inspect_exported(path)
    if (path / MANIFEST).is_file() or (path.parent.name == "checkpoints" and path.is_dir()):
        return _inspect_checkpoint(path)
    if (path / "checkpoints").is_dir():
        checkpoints = sorted(p for p in (path / "checkpoints").iterdir() if p.is_dir() and not p.name.startswith("."))
        return max((_inspect_checkpoint(p) for p in checkpoints), default=WHOLE)
    raise InputError(
        f"{path} holds neither latent shards nor a checkpoint, a run or an exported model; give the output of "
        "`ldt encode`, `ldt train` or `ldt export`"
    )


def _inspect_checkpoint(path: Path) -> int:
    try:
        checkpoint = Checkpoint.read(path).verify()
    except Damaged as error:
        print(f"damaged: {error}")
        return DAMAGED
    manifest = checkpoint.manifest
    written, numbers = manifest["written_by"], [math.prod(s) for s in manifest["parameters"].values()]
    facts = {
        "samples seen": checkpoint.samples_seen,
        "parameters": sum(numbers),
        "tensors": ", ".join(manifest["tensors"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "written by": f"{written['world_size']} ranks at ZeRO stage {written['zero_stage']}, ldt {written['ldt']}",
    }
    _print_facts(facts | _data_of(checkpoint.config.get("data", {})))
    print(f"whole: {path}")
    return WHOLE


def _inspect_exported(path: Path) -> int:
    try:
        tensors, facts, _ = read_exported(path)
    except InputError as error:
        print(f"damaged: {error}")
        return DAMAGED
    sources = facts.get("made_from", {})
    shown = {
        "samples seen": facts["samples_seen"],
        "parameters": sum(t.numel() for t in tensors.values()),
        "weights": facts.get("weights", "unknown"),
        "made from": ", ".join(list(sources)[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else ""),
    }
    _print_facts(shown | _data_of(facts["config"].get("data", {})))
    print(f"whole: {path}")
    return WHOLE


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        print(on_one_line(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value}"))


def _data_of(data: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint was trained on, as its config tells: paths, and shares of several sources."""
    sources = data.get("sources") or {}
    whole = sum(source["weight"] for source in sources.values())
    shares = {f"source {name}": f"{100 * s['weight'] / whole:.2f} % {s['path']}" for name, s in sorted(sources.items())}
    return shares or {"data": data.get("path", "unknown")}


def _inspect_buckets(config: InspectJob) -> int:
    """Every bucket as data of its own; a grid is drawn of each, with its name in the file's."""
    path, grid = Path(config.path), Path(config.grid)
    try:
        known = read_buckets(path) or {}
    except InputError as error:
        print(f"damaged: {error}")
        return DAMAGED
    code, shards = WHOLE, {}
    for name in known:
        print(f"bucket {name}:")
        of_bucket = str(grid.with_name(f"{grid.stem}-{name}{grid.suffix}")) if config.grid else ""
        code = max(code, _inspect_shards(replace(config, path=str(path / name), grid=of_bucket)))
    if code != WHOLE:
        return code
    try:
        shards = {name: open_shards(path / name) for name in known}
        check_buckets(path, known, shards)
        samples = BucketShards(path, shards).manifest.samples
    except InputError as error:
        print(f"damaged: {error}")
        return DAMAGED
    for name, view in shards.items():
        share = view.manifest.samples / samples
        _print_facts({f"share of bucket {name}": f"{share:.2%} of the batches"})
    print(f"whole: {config.path}")
    return WHOLE


def _inspect_shards(config: InspectJob) -> int:
    try:
        shards = open_shards(config.path)
    except InputError as error:
        print(f"{'unfinished' if (Path(config.path) / RECIPE).exists() else 'damaged'}: {error}")
        return DAMAGED
    summary = summarize(shards)
    _print_facts(summary.facts)
    held_out = _inspect_held_out(shards)
    for problem in [*summary.problems, *held_out]:
        print(f"damaged: {problem}")
    if summary.problems or held_out:
        return DAMAGED
    if config.grid:
        _draw(shards, config)
        print(f"decoded samples: {config.grid}")
    print(f"whole: {config.path}")
    return WHOLE


def _inspect_held_out(shards: LatentShards) -> list[str]:
    """What is wrong with the held-out split; prints how many samples it has."""
    where, recipe = Path(shards.path) / VALIDATION, shards.manifest.recipe
    images = recipe.get("number of images")
    expected = images - shards.manifest.samples if isinstance(images, int) else None
    if not where.exists() and not expected:
        return []
    try:
        split = open_shards(where)
    except InputError as error:
        return [str(error)]
    print(f"{'held-out samples':28} {split.manifest.samples:,}")
    problems = summarize(split).problems
    if expected is not None and split.manifest.samples != expected:
        problems.append(f"{where} holds {split.manifest.samples:,} samples of {expected:,}; encode the data again")
    if (split.manifest.autoencoder_hash, split.manifest.classes) != (
        shards.manifest.autoencoder_hash,
        shards.manifest.classes,
    ):
        problems.append(f"{where} was encoded otherwise than the data beside it; encode the data again")
    return problems


def _draw(shards: LatentShards, config: InspectJob) -> None:
    manifest = shards.manifest
    autoencoder = Autoencoder.load(manifest.autoencoder)
    if autoencoder.hash != manifest.autoencoder_hash:
        raise InputError(f"autoencoder {manifest.autoencoder} is not the one that {config.path} was encoded with")
    latent_BCHW, label_B = latents_to_show(shards, config.images)
    image_BHWC = autoencoder.decode(torch.from_numpy(latent_BCHW.copy()))
    write_picture(Path(config.grid), class_grid(image_BHWC.cpu().numpy(), label_B))
