"""The data of a training run: one directory of latent shards, or several mixed ones."""

from pathlib import Path

from ldt.data.mixture import Mixture
from ldt.data.shards import LatentShards, Manifest, MixedShards, Shards, open_shards, open_validation
from ldt.data.shards.sources import changed_sources
from ldt.dist import World, on_rank_zero
from ldt.errors import InputError
from ldt.training.config import DataConfig


def open_data(config: DataConfig, world: World) -> Shards:
    """What is trained on; rank 0 reads the manifests (collective)."""
    if not config.sources:
        return _open(config.path, config, world)
    opened = {name: _open(source.path, config, world) for name, source in sorted(config.sources.items())}
    return MixedShards(opened, _weights(config))


def open_held_out(config: DataConfig, world: World) -> Shards:
    """The held-out split, of all sources together; `InputError` names the one that has none (collective)."""
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


def describe_data(shards: Shards, batch: int) -> list[str]:
    """A line about each source of a mixture: its share, and what an epoch of it is."""
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
