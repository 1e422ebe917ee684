"""What a training run settles before its first step: its micro-batch, its loaders, and what it says of itself."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ldt import log
from ldt.data.batch import SampleDraws
from ldt.data.buffer import RankSlice
from ldt.data.latent_spec import LatentSpec
from ldt.data.loader import AnyShards, BucketValidation, Loader, ValidationLoader, make_order, views_of
from ldt.dist import World, all_gather
from ldt.engine import memory
from ldt.errors import InputError
from ldt.nn.align import add_projector
from ldt.nn.build import checkpoint_blocks, parameter_count
from ldt.nn.sizes import flops
from ldt.progress import pluralize, si_format
from ldt.training.config import TrainJob
from ldt.training.data import describe_data, open_held_out

logger = log.get_logger(__name__)

TINY_DEVIATION = 1e-6  # of a channel of latents, whose deviation is about 1 to 10 before whitening


def fit_into_memory(denoiser: nn.Module, config: TrainJob, spec: LatentSpec, averages: int, world: World) -> int:
    """The micro-batch, chosen here if it is auto; where activations have a budget, blocks are set to be recomputed.

    averages: how many of the weights are kept.
    """
    engine, micro_batch = config.engine, config.train.micro_batch
    budget = 1e9 * engine.activation_memory_gb
    if micro_batch != "auto" and not budget:
        return int(micro_batch)
    classes = len(spec.classes)
    cost = memory.activations(
        config.model, spec.latent_shape, classes, spec.text_shape, engine.precision, world.device.type
    )
    least = cost.blocks if config.model.activation_checkpointing else 0
    share, parameters = -(-config.train.global_batch // world.size), parameter_count(denoiser)

    def state_of(micro_batches: int) -> memory.State:
        return memory.state_bytes(parameters, engine.zero_stage, engine.precision, world.size, averages, micro_batches)

    def room(state: memory.State) -> float:
        free = memory.available(world.device, world.local_size) - state.peak
        return budget or memory.ROOM * min(all_gather(free))  # the same on all ranks

    _, samples, blocks = cost.settle(micro_batch, share, state_of, room, least)
    checkpoint_blocks(denoiser, blocks)
    held = cost.of(samples, blocks) / 1e9
    logger.info("micro-batch %d keeps %.3g GB; recomputed blocks: %d of %d", samples, held, blocks, cost.blocks)
    return samples


def denoised(config: TrainJob, shards: AnyShards) -> LatentSpec:
    """The facts of what the denoiser makes: latents as the data have them, and perhaps a class token."""
    spec, weight = shards.manifest.spec, config.align.token_weight
    if not weight:
        return spec
    target = target_of(shards, "token_weight", weight)
    logger.info("the features of %s are denoised as a class token beside the image", target["name"])
    return replace(spec, token=target["shape"][0])


def target_of(shards: AnyShards, key: str, value: float) -> dict[str, Any]:
    """What the data's manifest says of their targets; `InputError` where there are none."""
    if not shards.manifest.target:
        raise InputError(
            f"align.{key}={value} needs data with targets, and {shards.path} has none; encode the images with "
            "target=efficientnet_lite0 or timm:NAME"
        )
    return shards.manifest.target


def align_denoiser(denoiser: nn.Module, config: TrainJob, shards: AnyShards) -> None:
    """Give the denoiser its projector, where it is to be aligned; `InputError` unless the data have targets for it."""
    align = config.align
    if not align.weight:
        return
    target = target_of(shards, "weight", align.weight)
    features, *grid = target["shape"]
    tokens = [side // config.model.patch for side in shards.manifest.latent_shape[1:]]
    if grid != tokens:
        raise InputError(
            f"{shards.path} has targets on a grid of {'x'.join(map(str, grid))} patches, and the denoiser has "
            f"{'x'.join(map(str, tokens))} tokens; encode with target_grid={tokens[0]}"
        )
    add_projector(denoiser, config.model.width, features, align.block, config.seed)
    logger.info("tokens after block %d are aligned with %s (%s)", align.block, target["name"], target["hash"][:12])


def make_loaders(
    config: TrainJob, shards: AnyShards, micro_batch: int, world: World
) -> tuple[Loader, ValidationLoader | BucketValidation | None]:
    """The loader of the training data and, if there is validation, that of the held-out split.

    micro_batch: of the largest latents, where there are several shapes.
    """
    data, on, token = config.data, config.model.condition_on, config.align.token_weight > 0
    order = make_order(shards, config.seed, config.train.global_batch, data.streams, data.window)
    views = views_of(shards)
    shapes = [view.manifest.latent_shape for view in views.values()]
    shares = RankSlice.by_bucket(config.train.global_batch, world.rank, world.size, micro_batch, shapes)
    draws = SampleDraws(
        config.seed,
        config.objective.condition_drop,
        on,
        shards.manifest.flips,
        config.objective.mean_flow,
        config.align.weight > 0 or token,
        token,
    )
    loader = Loader(shards, order, shares, draws, world.device, data.threads)
    if not config.log.validation_every_samples:
        return loader, None
    held_out, draws = open_held_out(data, shards, world), SampleDraws(config.seed, 0.0, on, target=token, token=token)
    if token and held_out.manifest.target != shards.manifest.target:
        raise InputError(f"{held_out.path} has other targets than {shards.path}; encode both with one target")
    if held_out.manifest.samples == 0:
        raise InputError(f"{held_out.path} holds no samples; encode with a larger validation_fraction")
    if held_out.manifest.samples < config.log.validation_times:
        raise InputError(
            f"{held_out.path} holds {held_out.manifest.samples} samples, fewer than log.validation_times="
            f"{config.log.validation_times}; ask for fewer times, or encode with a larger validation_fraction"
        )
    rows = {name: share.size for name, share in zip(views, shares, strict=True)}
    parts, first = {}, 0
    for name, view in views_of(held_out).items():
        part = RankSlice.of(view.manifest.samples, world.rank, world.size, rows[name])
        parts[name] = ValidationLoader(view, draws, part, world.device, first=first)
        first += view.manifest.samples
    return loader, parts.get("") or BucketValidation(parts)


def describe(
    config: TrainJob, shards: AnyShards, parameters: int, kernel: str, share: RankSlice, samples_seen: int, world: World
) -> Iterator[str]:
    """The lines that a run begins with."""
    spec = shards.manifest.spec
    token = shards.manifest.target["shape"][0] if config.align.token_weight else 0
    kind = "UNet" if config.model.name == "unet" else f"Transformer ({config.model.conditioning})"
    cost = si_format(spec.average(lambda shape: flops(config.model, shape, spec.text_shape, token)))
    size = si_format(parameters)
    yield f"model: {kind}, {size} parameters, {cost}FLOP an image and forward pass, attention by {kernel}"
    classes, shape = pluralize(len(spec.classes), "class", "classes"), "×".join(map(str, spec.latent_shape))
    latents = f"{len(spec.buckets)} buckets of latents up to" if spec.buckets else "latents"
    yield f"data: {shards.manifest.samples:,} samples in {classes}, {latents} {shape} of {spec.image_size} pixels"
    yield from describe_constant(spec)
    yield from describe_data(shards, config.train.global_batch)
    if spec.text and not config.model.uses_text:
        yield "the data's captions are not used: model.condition_on=class"
    total = config.train.total_samples
    processes = pluralize(world.size, "process", "processes")
    yield (
        f"run: {processes} on {world.device.type}, ZeRO-{config.engine.zero_stage}, "
        f"{config.engine.precision}; global batch {config.train.global_batch} in "
        f"{pluralize(share.count, 'micro-batch', 'micro-batches')} of up to {share.size} a process; "
        f"{max(total - samples_seen, 0):,} of {total:,} samples to go"
    )
    yield from describe_idle(world, config.train.global_batch, 1 + config.data.threads)


def describe_constant(spec: LatentSpec) -> Iterator[str]:
    """Where all latents are the same up to rounding, which whitening makes as large as the rest."""
    constant_CHW = spec.whitening[1] < TINY_DEVIATION  # [C, 1, 1] unless each element is whitened by itself
    whole_C, some = constant_CHW.all((1, 2)), ""
    if whole_C.any():
        some = f"channel {', '.join(map(str, np.flatnonzero(whole_C)))}"
    elif constant_CHW.any():
        first = ", ".join(map(str, np.argwhere(constant_CHW)[0]))
        some = f"{constant_CHW.sum():,} of {constant_CHW.size:,} elements, the first [{first}]"
    if some:
        yield (
            f"the latents never change in {some} (deviation below {TINY_DEVIATION:g}): nothing can be learned there "
            "but rounding; look at the autoencoder and the images"
        )


def describe_idle(world: World, batch: int, threads: int = 1) -> Iterator[str]:
    """What the run leaves idle: GPUs without a process, processes without a sample, cores that no thread may use."""
    cores, fair = len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // world.local_size
    if cores < min(threads, fair):
        yield (
            f"a process may use {cores} of this machine's {os.cpu_count()} cores and has {threads} threads that share "
            "them: the launcher has bound it (srun --cpu-bind=none, or more --cpus-per-task)"
        )
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if gpus > world.size == 1:
        yield f"1 of this machine's {gpus} GPUs is used; torchrun --nproc_per_node {gpus} -m ldt train … uses all"
    if batch < world.size:
        yield f"{world.size - batch} of {world.size} processes have nothing to do: train.global_batch={batch}"
