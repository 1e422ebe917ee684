"""Draw images from a checkpoint: a grid, a folder of PNGs, or one .npz.

Image i is a function of the checkpoint, the sampling keys and (seed, i): of no rank, no world size, no number of
images. The network always sees whole blocks of `block` consecutive ids, because the last bits of its output depend on
the size of its batch; images beyond the number asked for are dropped.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldt import log, rng
from ldt.autoencoder import Autoencoder
from ldt.checkpoint import Loaded, Sampling, load_denoiser
from ldt.config import to_dict
from ldt.diffusion.objectives import Denoiser, Objective
from ldt.diffusion.samplers import SamplerConfig, sample
from ldt.dist import World, broadcast, in_block_order, process_group
from ldt.errors import InputError
from ldt.nn.build import compile_blocks
from ldt.nn.condition import Condition
from ldt.options import check_seed, choice, required
from ldt.pictures import WRITERS
from ldt.rng import Purpose
from ldt.text import TextEncoder, reload_text_encoder

logger = log.get_logger(__name__)

MOST_STEPS = 4096  # (image id, step) make one key of the noise that stochastic samplers add


@dataclass
class DrawConfig(SamplerConfig):
    """What decides image i besides the checkpoint.

    `labels`: class i mod classes; or drawn by (seed, i), each class as likely as in the training data, or all equally.
    `compile`: the denoiser's blocks with torch.compile, for large ones on a GPU; it changes the last bits.
    """

    seed: int = 0
    labels: str = choice("balanced", "data", "random")
    block: int = 50
    weights: str = choice("ema", "master")
    precision: str = choice("fp32", "bf16")
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.steps > MOST_STEPS:
            raise InputError(f"steps={self.steps} must be at most {MOST_STEPS}")
        if self.block < 1:
            raise InputError(f"block={self.block} must be at least 1; it is how many images the network makes at once")


@dataclass
class Config(DrawConfig):
    """`run`: a run directory (its newest checkpoint) or a checkpoint; `classes`: names or numbers, none for all.

    `prompts`: captions for a denoiser of text, image i has prompt i mod their number; a file name ending in .txt stands
    for its lines. Without them some captions of the training data are used; with them, and no `classes`, no class is
    told.
    """

    run: str = required()
    images: int = 80
    classes: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    format: str = choice("grid", "folder", "npz")
    output: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise InputError(f"images={self.images} must be at least 1")


# ----------------------------------------------------------------------------------------------------- ids to images


@dataclass(frozen=True)
class ImageModel:
    """Everything that turns noise into images."""

    denoiser: Denoiser
    objective: Objective
    sampling: Sampling
    autoencoder: Autoencoder
    device: torch.device
    text: TextEncoder | None = None

    @property
    def examples(self) -> list[tuple[int, str]]:
        """Labels and captions that images are drawn of unless others are given; none for a denoiser of classes."""
        if self.text is None:
            return []
        return [(int(label), caption) for label, caption in self.sampling.text["examples"]] or [(0, "")]


def image_model(loaded: Loaded, precision: str, device: torch.device, compiled: bool = False) -> ImageModel:
    """The image model of a loaded checkpoint; under `bf16` the denoiser's weights are rounded, as in training."""
    autoencoder = load_autoencoder(loaded.sampling, device)
    denoiser = loaded.denoiser.bfloat16() if precision == "bf16" else loaded.denoiser
    if compiled:
        compile_blocks(denoiser)
    told_text = loaded.config["model"].get("condition_on", "class") != "class"
    text = load_text(loaded.sampling, told_text, device)
    return ImageModel(denoiser, loaded.objective, loaded.sampling, autoencoder, device, text)


def load_text(sampling: Sampling, told_text: bool, device: torch.device) -> TextEncoder | None:
    """The encoder of a denoiser's captions, None where it is told of classes alone."""
    return reload_text_encoder(sampling.text, device) if told_text else None


def load_autoencoder(sampling: Sampling, device: torch.device) -> Autoencoder:
    """The autoencoder that a denoiser was trained with; refuses one with other weights."""
    autoencoder = Autoencoder.load(sampling.autoencoder).to(device)
    if autoencoder.hash != sampling.autoencoder_hash:
        raise InputError(
            f"autoencoder {sampling.autoencoder} has weights {autoencoder.hash[:12]}, but the data were encoded with "
            f"{sampling.autoencoder_hash[:12]}; put the original weights back, or encode and train again"
        )
    return autoencoder


def labels_of(id_B: Sequence[int], sampling: Sampling, config: DrawConfig) -> NDArray[np.int64]:
    """The class of each image id: int64 [B]."""
    ids, classes = np.asarray(id_B, np.int64), len(sampling.classes)
    if config.labels == "balanced":
        return ids % classes
    if config.labels == "data" and not sampling.class_counts:
        raise InputError("labels=data needs a checkpoint that knows its data's class counts; use balanced or random")
    counts = np.array(sampling.class_counts if config.labels == "data" else [1] * classes, np.int64)
    place = rng.uniform(config.seed, Purpose.SAMPLE_LABEL, ids, 1)[:, 0] * counts.sum()
    return np.searchsorted(np.cumsum(counts), place, "right").astype(np.int64)


def default_labels(model: ImageModel, id_B: Sequence[int], config: DrawConfig) -> NDArray[np.int64]:
    """The class of each image id: of the example captions that it has too, or `labels_of`."""
    if examples := model.examples:
        return np.array([examples[i % len(examples)][0] for i in id_B], np.int64)
    return labels_of(id_B, model.sampling, config)


@torch.no_grad()  # not inference mode: a training engine may own the denoiser
def sample_images(
    model: ImageModel,
    id_B: Sequence[int],
    config: DrawConfig,
    label_B: NDArray[np.int64] | None = None,
    prompts: Sequence[str] = (),
) -> Tensor:
    """Images of these ids as one batch: uint8 [B, H, W, C] on the CPU.

    Labels and captions are `labels_of` the ids, or those of the model's examples, unless given.
    """
    classes, shape = len(model.sampling.classes), model.sampling.latent_shape
    labels = torch.from_numpy(default_labels(model, id_B, config) if label_B is None else label_B)
    text = None
    if model.text is not None:
        captions = list(prompts) or [caption for _, caption in model.examples]
        content = model.text.encode([captions[i % len(captions)] for i in id_B])
        kind = torch.int64 if model.text.shape.vocabulary else torch.float32
        text = torch.from_numpy(content).to(model.device, kind)
    noise = torch.from_numpy(rng.normal(config.seed, Purpose.SAMPLE_NOISE, id_B, int(np.prod(shape))))
    noise_BCHW = noise.view(-1, *shape).to(model.device)
    condition = Condition(label_B=labels.to(model.device), text=text)

    def step_noise(step: int) -> Tensor:
        key_B = np.asarray(id_B, np.int64) * MOST_STEPS + step
        return (
            torch.from_numpy(rng.normal(config.seed, Purpose.SAMPLE_STEP, key_B, noise[0].numel()))
            .view(noise_BCHW.shape)
            .to(model.device)
        )

    latent_BCHW = sample(model.denoiser, model.objective, noise_BCHW, condition, classes, config, step_noise)
    mean_C11 = torch.tensor(model.sampling.mean_C, device=model.device)[:, None, None]
    std_C11 = torch.tensor(model.sampling.std_C, device=model.device)[:, None, None]
    return model.autoencoder.decode(latent_BCHW * std_C11 + mean_C11).cpu()


def block_ids(k: int, block: int) -> range:
    """The ids of block k, always `block` of them."""
    return range(k * block, (k + 1) * block)


# ------------------------------------------------------------------------------------------------------- the program


def run(config: Config) -> int:
    """Draw the images on all ranks; rank 0 writes them."""
    with process_group() as world:
        loaded = load_denoiser(config.run, config.weights, world.device)
        model = image_model(loaded, config.precision, world.device, config.compile)
        output = _output(config, loaded, world)
        blocks, labels = draw(model, loaded.config, config, world)
        with log.progress(config.images, "img", "sample", show=world.rank == 0) as bar:
            blocks = _counted(blocks, bar.update)
            if world.rank == 0:
                record = {"samples_seen": loaded.samples_seen, "checkpoint_hash": loaded.hash, **to_dict(config)}
                record["prompts"] = _prompts(config.prompts, model)
                WRITERS[config.format](output, blocks, labels, record)
            else:
                deque(blocks, maxlen=0)
        if world.rank == 0:
            print(f"{config.images} images of the checkpoint at {loaded.samples_seen} samples: {output}")
    return 0


def draw(
    model: ImageModel, trained: dict[str, Any], config: Config, world: World | None = None
) -> tuple[Iterator[NDArray[np.uint8]], NDArray[np.int64]]:
    """Images 0 to config.images − 1 as blocks uint8 [B, H, W, C] in order, and their labels int64 [N].

    trained: the config of the denoiser's training. The ranks of `world` share the work, and each gets all blocks.
    """
    if config.classes and trained["model"].get("condition_on") == "text":
        raise InputError("classes= needs a denoiser of classes, and this one knows text alone; use prompts=")
    classes = model.sampling.classes
    chosen = np.array(_chosen_classes(config.classes, classes), np.int64)
    prompts = _prompts(config.prompts, model)

    def labels(ids: Sequence[int]) -> NDArray[np.int64]:
        if len(chosen):
            return chosen[np.asarray(ids) % len(chosen)]
        return np.full(len(ids), len(classes)) if prompts else default_labels(model, ids, config)

    def produce(k: int) -> NDArray[np.uint8]:
        ids = block_ids(k, config.block)
        return sample_images(model, ids, config, labels(ids), prompts).numpy()[: config.images - ids.start]

    blocks, world = -(-config.images // config.block), world or World(0, 1, 0, 1, model.device)
    return in_block_order(blocks, produce, world), labels(range(config.images))


def _counted(blocks: Iterator[NDArray[np.uint8]], update: Callable[[int], object]) -> Iterator[NDArray[np.uint8]]:
    for block_NHWC in blocks:
        yield block_NHWC
        update(len(block_NHWC))


def _chosen_classes(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Numbers of the classes asked for by name or number."""
    chosen = []
    for word in wanted:
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            chosen.append(int(word))
        else:
            names = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise InputError(
                f"class {word} is not one of the checkpoint's {len(classes)} ({names}); give a name or number"
            )
    return chosen


def _prompts(wanted: Sequence[str], model: ImageModel) -> list[str]:
    """The captions asked for."""
    if wanted and model.text is None:
        raise InputError(
            "prompts= needs a denoiser of text, and this one knows classes alone; use classes=, or train with "
            "model.condition_on=text"
        )
    out: list[str] = []
    for word in wanted:
        if not isinstance(word, str):  # YAML reads `flag: japan` as a mapping
            raise InputError(
                f"prompt {word} is not text; put a caption with a colon in quotes, or all into a .txt file"
            )
        if not word.endswith(".txt"):
            out.append(word)
            continue
        try:
            out += Path(word).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts file {word} can't be read ({error}); give a text file, one a line") from None
    return out


def _output(config: Config, loaded: Loaded, world: World) -> Path:
    """Where the images go, found free before any is made."""
    suffix = {"grid": ".png", "folder": "", "npz": ".npz"}[config.format]
    default = loaded.home / "samples" / f"{config.format}-{loaded.samples_seen:012d}{suffix}"
    output = Path(config.output) if config.output else default
    if config.format == "folder" and broadcast(output.exists()):
        raise InputError(f"output {output} exists; remove it, or give another output=")
    if config.format != "folder" and output.is_dir():
        raise InputError(f"output {output} is a directory, but format={config.format} writes a file; give its name")
    if world.rank == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
    return output
