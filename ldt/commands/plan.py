"""What a run will need, before a cluster is booked: memory, step time, traffic, checkpoints, hours, cost.

`ldt plan CONFIG nodes=64 gpus=8 device=h100`. Everything follows from the config and from data sheets by the formulas
of docs/plan.md; BENCHMARKS.md compares them with published and with measured runs.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ldt.commands.gpu_specs import DEVICES
from ldt.config_fields import choice
from ldt.data.buffer import RankSlice
from ldt.data.shard_files import BUCKETS, HEAD
from ldt.data.shards import Manifest
from ldt.data.shards.buckets import read_buckets
from ldt.diffusion import mean_flow
from ldt.engine import ema, memory, roofline
from ldt.engine.config import at_work
from ldt.errors import InputError
from ldt.nn.build import build, check_shapes, parameter_count
from ldt.nn.sizes import attention_flops, flops
from ldt.nn.text_shape import TextShape
from ldt.progress import pluralize
from ldt.training.config import TrainJob

PRODUCTS_RATE, ATTENTION_RATE, MEMORY_RATE = 0.55, 0.2, 0.8
"""What large matrix products and flash attention reach of the data sheet's dense products, and elementwise operations
of its memory's bandwidth."""

LOADER_RATE = 250e6
"""Normal numbers a second for which one loader thread reads, draws and hashes: two a number of the latent, or one
where there is no posterior to draw from (BENCHMARKS.md)."""


@dataclass
class PlanJob(TrainJob):
    """The keys of a training run, and those of the cluster that it is planned for.

    device: its data sheet; device_tflops, device_memory_gb: instead of the sheet's, such as a measured matrix peak (0:
    the sheet's). network_gb: bytes a second between nodes for each GPU, and disk_gb of the file system under the run,
    in 10⁹. price: of a GPU hour. latent, classes, posterior (false of a representation or deep-compression autoencoder,
    whose latents have no deviation): of data that are not there yet. autocast: plan for code that
    keeps everything between products in float32, as others' under autocast; here it has the weights' precision.
    """

    nodes: int = 1
    gpus: int = 8
    device: str = choice(*["h100", *(d for d in DEVICES if d != "h100")])
    device_tflops: float = 0.0
    device_memory_gb: float = 0.0
    network_gb: float = 50.0
    disk_gb: float = 2.0
    price: float = 0.0
    latent: str = "4x32x32"
    classes: int = 1000
    posterior: bool = True
    autocast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("nodes", "gpus", "classes"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("network_gb", "disk_gb"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key}={getattr(self, key)} must be a number above 0")
        for key in ("device_tflops", "device_memory_gb", "price"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{key}={getattr(self, key)} must be a number from 0")
        sizes = self.latent.split("x")
        if len(sizes) != 3 or not all(s.isdecimal() and int(s) for s in sizes):
            raise InputError(f"latent={self.latent} must be channels, height and width, such as 4x32x32")


@dataclass(frozen=True)
class Model:
    """What the plan needs to know about the denoiser and the data."""

    parameters: int
    data: str  # what is known of them, in words
    flops: int  # of one image, forward
    attention: int  # of these
    elementwise: roofline.Elementwise
    activations: memory.Activations
    sample_bytes: int  # of its latent in the shards
    sample_draws: int  # normal numbers for it


@dataclass(frozen=True)
class Placement:
    """One way to run it: numbers of one rank."""

    nodes: int
    ranks: int
    stage: int
    share: RankSlice
    recomputed: int  # blocks
    state: memory.State
    memory: int
    products: float  # seconds of a step
    attention: float
    between: float  # elementwise operations
    optimizer: float
    traffic: int  # bytes that a rank sends in a step
    communication: float  # seconds of a step

    @property
    def compute(self) -> float:
        """All that the GPU does."""
        return self.products + self.attention + self.between + self.optimizer

    @property
    def step(self) -> float:
        return self.compute + self.communication


def run(config: PlanJob) -> int:
    """Print the plan."""
    model = measure(config)
    chosen = place(config, model, config.nodes, config.engine.zero_stage)
    for line in (*report(config, model, chosen), *by_bucket(config, chosen)):
        print(line)
    return 0


def measure(config: PlanJob, latent_shape: tuple[int, int, int] | None = None) -> Model:
    """Build the denoiser without weights, and count. latent_shape: of one bucket; by default of the largest."""
    shape, classes, text, posterior, known_from = data_shape(config)
    shape, align = latent_shape or shape, config.align
    features = _target_features(config) if align.weight or align.token_weight else 0
    token = features if align.token_weight else 0
    with torch.device("meta"):
        parameters = parameter_count(build(config.model, shape, classes, config.seed, text, token))
    kept = memory.activations(config.model, shape, classes, text, config.engine.precision, "cuda")
    numbers = (2 if posterior else 1) * math.prod(shape)
    data = f"latents {'x'.join(map(str, shape))} in {pluralize(classes, 'class', 'classes')} ({known_from})"
    precision = "fp32" if config.autocast else config.engine.precision
    between = roofline.elementwise(config.model, shape, classes, text, precision)
    counts = flops(config.model, shape, text, token), attention_flops(config.model, shape, text, token)
    sample_bytes = 2 * numbers  # a sample is the mean and, with a posterior, the deviation in fp16
    tokens = shape[1] * shape[2] // config.model.patch**2
    if align.weight:
        product = 9 * config.model.width * features  # the projector's 3 x 3 convolution
        parameters, counts = parameters + product + features, (counts[0] + 2 * product * tokens, counts[1])
    sample_bytes += 2 * features * tokens
    return Model(parameters, data, *counts, between, kept, sample_bytes, numbers + token)  # a normal number for each


def _target_features(config: PlanJob) -> int:
    """Of the network whose features are targets in the data; of a ViT-B where they are not here."""
    there = (Path(config.data.path) / HEAD).exists() and Manifest.load(config.data.path).target
    return int(there["shape"][0]) if there else 768


def data_shape(config: PlanJob) -> tuple[tuple[int, int, int], int, TextShape | None, bool, str]:
    """Latent shape, classes, captions and whether there is a posterior: of the data if they are there, else as the
    config says; and which it was."""
    path = config.data.path or next(source.path for source in config.data.sources.values())  # they are alike
    if buckets := manifests_of_buckets(config):
        check_shapes(config.model, {name: m.latent_shape for name, m in buckets.items()})
        m = max(buckets.values(), key=lambda m: math.prod(m.latent_shape))
        return m.latent_shape, len(m.classes), m.text_shape, m.posterior, f"the largest of {len(buckets)} in {path}"
    if (Path(path) / HEAD).exists():
        manifest = Manifest.load(path)
        classes = len(manifest.classes)
        return manifest.latent_shape, classes, manifest.text_shape, manifest.posterior, f"as in {path}"
    channels, height, width = map(int, config.latent.split("x"))
    text = TextShape(256, vocabulary=257) if config.model.uses_text else None
    known_from = f"by latent= and classes=: {path} is not here"
    return (channels, height, width), config.classes, text, config.posterior, known_from


def manifests_of_buckets(config: PlanJob) -> dict[str, Manifest]:
    """Of data in buckets, if they are here; else none."""
    path = config.data.path
    known = read_buckets(path) if path and (Path(path) / BUCKETS).exists() else {}
    return {name: Manifest.load(Path(path) / name) for name in known or {}}


def by_bucket(config: PlanJob, chosen: Placement) -> Iterator[str]:
    """What a step of each bucket takes at that place, and all of them together."""
    manifests = manifests_of_buckets(config)
    total, mean = sum(m.samples for m in manifests.values()), 0.0
    for name, m in manifests.items():
        model = measure(config, m.latent_shape)
        step = place(config, model, chosen.nodes, chosen.stage).step
        mean += m.samples / total * step
        shape = "x".join(map(str, m.latent_shape))
        yield (
            f"{f'bucket {name}':14} {m.samples / total:.1%} of the batches, latents {shape}: "
            f"{model.flops / 2e9:.2f} G multiply-adds an image, a step of {step:.3f} s"
        )
    if manifests:
        hours = config.train.total_samples / config.train.global_batch * mean / 3600
        yield f"all buckets    a mean step of {mean:.3f} s, {hours:.1f} hours; all above is of the largest bucket"


def place(config: PlanJob, model: Model, nodes: int, stage: int) -> Placement:
    """The numbers of a run on that many nodes at that ZeRO stage."""
    engine, ranks = config.engine, nodes * config.gpus
    averages = len(ema.profiles(config.ema))

    def state_of(micro_batches: int) -> memory.State:
        return memory.state_bytes(model.parameters, stage, engine.precision, ranks, averages, micro_batches)

    state, share, recomputed = _micro_batches(config, model, ranks, state_of)
    need = state.peak + model.activations.of(share.size, recomputed)
    muon = config.optimizer.muon_lr > 0
    if muon:
        need = max(need, state.persistent + memory.muon_bytes(model.parameters, stage, ranks))
    again = model.activations.share(recomputed)  # of a forward pass more
    flow = config.objective.mean_flow
    passes = again + mean_flow.forward_passes(flow, config.objective.mean_flow_guidance)
    scores = passes + flow  # in its derivative attention counts once more
    rows, attention = share.rows, model.attention
    traffic = traffic_bytes(model.parameters, stage, engine.precision, ranks, muon)
    moved = roofline.optimizer_bytes(model.parameters, stage, engine.precision, ranks, averages, share.count)
    return Placement(
        nodes=nodes,
        ranks=ranks,
        stage=stage,
        share=share,
        recomputed=recomputed,
        state=state,
        memory=need,
        products=(3 + passes) * (model.flops - attention) * rows / (PRODUCTS_RATE * peak(config)),
        attention=(3.5 + scores) * attention * rows / (ATTENTION_RATE * peak(config)),  # its backward pass: 2.5 forward
        between=rows * model.elementwise.of(passes, config.engine.compile) / bandwidth(config),
        optimizer=moved / bandwidth(config),
        traffic=traffic,
        communication=traffic / network(config, nodes),
    )


def network(config: PlanJob, nodes: int) -> float:
    """Bytes a second of a ring: it enters and leaves each node once, over all of the node's network at a time."""
    link = DEVICES[config.device].link
    return link if nodes == 1 else min(link, config.gpus * config.network_gb * 1e9)


def bandwidth(config: PlanJob) -> float:
    return MEMORY_RATE * DEVICES[config.device].bandwidth


def _micro_batches(
    config: PlanJob, model: Model, ranks: int, state_of: Callable[[int], memory.State]
) -> tuple[memory.State, RankSlice, int]:
    """The state, and the micro-batches and recomputed blocks that the trainer will choose on this device."""
    batch, micro_batch, cost = config.train.global_batch, config.train.micro_batch, model.activations
    given = 1e9 * config.engine.activation_memory_gb or (0 if micro_batch == "auto" else math.inf)

    def budget(state: memory.State) -> float:
        return given or max(memory.ROOM * (memory_of(config) - state.peak), cost.of(1, cost.blocks))

    least = cost.blocks if config.model.activation_checkpointing else 0
    state, samples, recomputed = cost.settle(micro_batch, -(-batch // ranks), state_of, budget, least)
    return state, RankSlice.of(batch, 0, ranks, samples), recomputed


def traffic_bytes(parameters: int, stage: int, precision: str, ranks: int, muon: bool = False) -> int:
    """Bytes a rank sends in a step by ring algorithms (1910.02054, section 7), as DeepSpeed 0.19 does it.

    An all-reduce of the gradients is twice their size; stages 1 and 2 all-reduce and then gather the weights, stage 3
    scatters gradients and gathers the weights twice. Muon gathers its updates in float32 at stage 0; at the others a
    rank sends its part of them, and its share of what was made, at stages 1 and 2 less: only of matrices not its own.
    """
    width, gradient = 2 if precision == "bf16" else 4, at_work(stage, precision, ranks, 1).summed_bytes
    passes = {0: 2 * gradient, 1: 2 * gradient + width, 2: 2 * gradient + width, 3: gradient + 2 * width}[stage]
    updates = 0 if not muon else 4 * parameters if stage == 0 else 8 * parameters // ranks
    return (passes * parameters + updates) * (ranks - 1) // ranks


def peak(config: PlanJob) -> float:
    """Matrix products a second of one GPU in the run's precision."""
    sheet = DEVICES[config.device]
    return 1e12 * config.device_tflops or (sheet.bf16 if config.engine.precision == "bf16" else sheet.tf32)


def memory_of(config: PlanJob) -> float:
    return 1e9 * config.device_memory_gb or DEVICES[config.device].memory


def report(config: PlanJob, model: Model, chosen: Placement) -> Iterator[str]:
    """The lines of the plan, as they are printed."""
    rate = config.train.global_batch / chosen.step
    hours = config.train.total_samples / rate / 3600
    save = (3 + len(ema.profiles(config.ema))) * 4 * model.parameters
    yield f"model          {model.parameters / 1e6:.1f} M parameters, {model.flops / 2e9:.2f} G multiply-adds an image"
    yield (
        f"place          {chosen.nodes} x {config.gpus} {config.device}, ZeRO-{chosen.stage} "
        f"{config.engine.precision}; a rank takes {chosen.share.count} x {chosen.share.size} of "
        f"{config.train.global_batch} samples"
    )
    for stage in stages(config):
        at = place(config, model, chosen.nodes, stage)
        mark = " <" if stage == chosen.stage else ""
        yield (
            f"memory ZeRO-{stage}  {at.memory / 1e9:.1f} GB a GPU of {memory_of(config) / 1e9:.0f}: state "
            f"{at.state.persistent / 1e9:.1f}, at work {at.state.peak / 1e9:.1f}, activations "
            f"{(at.memory - at.state.peak) / 1e9:.1f}; sends {at.traffic / 1e9:.2f} GB a step{mark}"
        )
    how = "compiled" if config.engine.compile else "eager"
    yield (
        f"step           {chosen.step:.3f} s: {chosen.products:.3f} matrix products (at {PRODUCTS_RATE:.0%} of "
        f"{peak(config) / 1e12:.0f} TFLOP/s), {chosen.attention:.3f} attention, {chosen.between:.3f} between them "
        f"({how}), {chosen.optimizer:.3f} optimizer, {chosen.communication:.3f} communication, not overlapped"
    )
    yield f"speed          {rate:,.0f} images/s, {rate / chosen.ranks:.1f} a GPU"
    yield f"data           {model.data}, {rate / chosen.nodes * model.sample_bytes / 1e6:.1f} MB/s a node"
    yield (
        f"checkpoint     {save / 1e9:.1f} GB, written in {save / 1e9 / config.disk_gb:.1f} s behind the training"
        + (f", every {config.checkpoint.every_samples / rate / 60:.0f} min" if config.checkpoint.every_samples else "")
    )
    yield f"time           {hours:.1f} h, {hours * chosen.ranks:,.0f} GPU hours" + (
        f", costs {hours * chosen.ranks * config.price:,.0f}" if config.price else ""
    )
    for line in warnings(config, model, chosen):
        yield f"warning        {line}"
    yield f"recommended    {recommendation(config, model)}"


def stages(config: PlanJob) -> list[int]:
    """The ZeRO stages that the precision allows."""
    return [1, 2, 3] if config.engine.precision == "bf16" else [0, 1, 2, 3]


def warnings(config: PlanJob, model: Model, chosen: Placement) -> Iterator[str]:
    """Warnings about what will make the planned run slow or make it fail."""
    batch, ranks = config.train.global_batch, chosen.ranks
    rate = batch / chosen.step
    if chosen.memory > memory_of(config):
        need, there = chosen.memory / 1e9, memory_of(config) / 1e9
        yield f"needs {need:.0f} GB of {there:.0f}: train.micro_batch=auto, or more ranks"
    if batch < ranks:
        yield f"train.global_batch={batch} is less than {ranks} ranks: some would only carry padding"
    elif chosen.share.rows * ranks > 1.05 * batch:
        yield f"{1 - batch / (chosen.share.rows * ranks):.0%} of the rows are padding: {batch} does not divide well"
    if chosen.communication > 0.25 * chosen.step:
        yield f"{chosen.communication / chosen.step:.0%} of the step is communication: fewer nodes or a larger batch"
    if rate / ranks * model.sample_draws > LOADER_RATE * config.data.threads:
        yield f"a rank takes {rate / ranks:,.0f} samples/s: raise data.threads={config.data.threads}"
    save = (3 + len(ema.profiles(config.ema))) * 4 * model.parameters / 1e9 / config.disk_gb
    every = config.checkpoint.every_samples / rate
    if every and every < 10 * save:
        yield f"a checkpoint every {every:.0f} s, and writing one takes {save:.0f} s: raise checkpoint.every_samples"
    lower = [s for s in stages(config) if s < 3 and fits(config, place(config, model, chosen.nodes, s))]
    if chosen.stage == 3 and lower:
        yield f"engine.zero_stage=3 without need: ZeRO-{lower[-1]} fits too, and gathers no weights while it computes"


def fits(config: PlanJob, at: Placement) -> bool:
    return at.memory <= 0.95 * memory_of(config)


def recommendation(config: PlanJob, model: Model) -> str:
    """The fastest stage that fits, and the most nodes that still work at 80 % of one node's speed a GPU."""
    options = [1 << k for k in range(11) if k == 0 or (1 << k) * config.gpus <= config.train.global_batch]
    good: list[Placement] = []
    for nodes in options:
        fitting = [at for stage in stages(config) if fits(config, at := place(config, model, nodes, stage))]
        fastest = min(fitting, key=lambda at: at.step, default=None)
        if fastest and (not good or fastest.step * nodes <= good[0].step * good[0].nodes / 0.8):
            good.append(fastest)
    if not good:
        return f"nothing fits {config.device}: use train.micro_batch=auto, a smaller model or a larger device"
    best = good[-1]
    hours = config.train.total_samples / config.train.global_batch * best.step / 3600
    where = "1 node" if best.nodes == 1 else f"up to {best.nodes} nodes"
    return (
        f"engine.zero_stage={best.stage} train.micro_batch={best.share.size}, {where} of {config.gpus} GPUs: "
        f"{hours:.1f} h"
    )
