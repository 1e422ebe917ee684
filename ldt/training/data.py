"""The data of a training run: one directory of latent shards, of buckets of them, or several mixed ones."""

from pathlib import Path

from ldt.data.latent_spec import LatentSpec
from ldt.data.loader import AnyShards
from ldt.data.mixture import Mixture
from ldt.data.shards import BucketShards, LatentShards, Manifest, MixedShards, open_shards, open_validation
from ldt.data.shards.buckets import check_buckets, read_buckets
from ldt.data.shards.sources import changed_sources
from ldt.dist import World, on_rank_zero
from ldt.errors import InputError
from ldt.training.config import DataConfig


def open_data(config: DataConfig, world: World) -> AnyShards:
    """What is trained on; rank 0 reads the manifests (collective)."""
    if not config.sources:
        known = on_rank_zero(world, lambda: read_buckets(config.path))
        if known is None:
            return _open(config.path, config, world)
        buckets = {name: _open(f"{config.path.rstrip('/')}/{name}", config, world) for name in sorted(known)}
        check_buckets(config.path, known, buckets)
        return BucketShards(config.path, buckets)
    opened = {name: _open(source.path, config, world) for name, source in sorted(config.sources.items())}
    return MixedShards(opened, _weights(config))


def open_held_out(config: DataConfig, data: AnyShards, world: World) -> AnyShards:
    """The held-out split, of all sources or buckets together; `InputError` names the one that has none (collective).

    data: those that are trained on, by whose statistics buckets are whitened.
    """
    if isinstance(data, BucketShards):
        return _open_held_out_buckets(config, data, data.manifest, world)
    paths = {f"data.sources.{name}.path": s.path for name, s in config.sources.items()} or {"data.path": config.path}
    held_out = on_rank_zero(world, lambda: {key: open_validation(path) for key, path in paths.items()})
    for key, where in held_out.items():
        if where is None:
            raise InputError(
                f"{key}={paths[key]} has no held-out split for log.validation_every_samples; "
                "encode with validation_fraction, or set log.validation_every_samples=0"
            )
    opened = {key: _open(str(where), config, world) for key, where in sorted(held_out.items())}
    if not config.sources:
        return opened["data.path"]
    return MixedShards({name: opened[f"data.sources.{name}.path"] for name in config.sources}, _weights(config))


def _open_held_out_buckets(config: DataConfig, data: BucketShards, spec: LatentSpec, world: World) -> BucketShards:
    """Those of the buckets that have a held-out split: small ones may have none."""
    paths = {name: str(view.path) for name, view in zip(data.names, data.views, strict=True)}
    held_out = on_rank_zero(world, lambda: {name: open_validation(path) for name, path in paths.items()})
    there = {name: where for name, where in held_out.items() if where is not None}
    if not there:
        raise InputError(
            f"data.path={config.path} has no held-out split in any bucket for log.validation_every_samples; "
            "encode with validation_fraction, or set log.validation_every_samples=0"
        )
    return BucketShards(config.path, {name: _open(where, config, world) for name, where in there.items()}, spec)


def describe_data(shards: AnyShards, batch: int) -> list[str]:
    """A line about each bucket or each source of a mixture: its share, and what an epoch of it is."""
    if isinstance(shards, BucketShards):
        return [
            f"bucket {name}: {view.manifest.samples / shards.manifest.samples:.2%} of the batches, latents "
            f"{'×'.join(map(str, view.manifest.latent_shape))}; it has {view.manifest.samples:,} samples"
            for name, view in zip(shards.names, shards.views, strict=True)
        ]
    if not isinstance(shards, MixedShards):
        return []
    whole, least = sum(shards.parts.values()), Mixture(list(shards.parts.values()), batch).least()
    return [
        f"source {name}: {part / whole:.2%} of the samples, at least {slots} in a batch of {batch}; it has "
        f"{shards.sources[name].manifest.samples} ({shards.sources[name].path})"
        for (name, part), slots in zip(shards.parts.items(), least, strict=True)
    ]


def other_data(config: DataConfig, before: str, now: str, where: str) -> str:
    """Why a checkpoint is not continued on these data, by their fingerprints."""
    changed = changed_sources(before, now) if config.sources else []
    named = [f"data.sources.{name}" for name in changed if name in config.sources] or [f"data.path={config.path}"]
    return (
        f"{', '.join(named)} holds other data (fingerprint {_short(now)}) than those that {where} was trained on "
        f"({_short(before)}); restore them, or choose another run_dir"
    )


def _open(path: str, config: DataConfig, world: World) -> LatentShards:
    def load(directory: str | Path) -> Manifest:
        return on_rank_zero(world, lambda: Manifest.load(directory))

    return open_shards(path, config.cache_dir or None, config.cache_gb, load)


def _weights(config: DataConfig) -> dict[str, float]:
    return {name: source.weight for name, source in config.sources.items()}


def _short(fingerprint: str) -> str:
    return fingerprint if " " in fingerprint else fingerprint[:12]
