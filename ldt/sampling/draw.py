"""Draw images from a checkpoint: a grid, a folder of PNGs, or one .npz.

Image i is a function of the checkpoint, the sampling keys and (seed, i): of no rank, no world size, no number of
images. The network always sees whole blocks of `block` consecutive ids, because the last bits of its output depend on
the size of its batch; images beyond the number asked for are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldt import log, rng
from ldt.checkpoint.load import Loaded, load_denoiser
from ldt.config import from_dict
from ldt.data.images.bucket_rule import Size
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.condition import Condition
from ldt.diffusion.guidance import Guide
from ldt.diffusion.objectives import Denoiser, Objective
from ldt.diffusion.samplers import sample
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
from ldt.models.text_encoder import TextEncoder, reload_text_encoder
from ldt.nn.build import check_shapes, compile_blocks
from ldt.nn.config import ModelConfig
from ldt.nn.entangled import Joined
from ldt.rng import Purpose
from ldt.sampling.config import MOST_STEPS, DrawConfig, ImageConfig

logger = log.get_logger(__name__)


# ----------------------------------------------------------------------------------------------------- ids to images


@dataclass(frozen=True)
class ImageModel:
    """Everything that turns noise into images."""

    denoiser: Denoiser
    objective: Objective
    spec: LatentSpec
    autoencoder: Autoencoder
    device: torch.device
    text: TextEncoder | None = None
    guide: Guide | None = None

    def at(self, shape: tuple[int, int, int]) -> "ImageModel":
        """The same for latents of another shape, of which it knows no buckets."""
        height = shape[1] * self.spec.image_size // self.spec.latent_shape[1]
        spec = replace(self.spec, latent_shape=shape, image_size=height, buckets={})
        guide = self.guide and self.guide.at(shape)
        return replace(self, spec=spec, objective=self.objective.at(shape), guide=guide)

    @property
    def examples(self) -> list[tuple[int, str]]:
        """Labels and captions that images are drawn of unless others are given; none for a denoiser of classes."""
        return [] if self.text is None else examples_of(self.spec)


def image_model(
    loaded: Loaded, precision: str, device: torch.device, compiled: bool = False, guide: Guide | None = None
) -> ImageModel:
    """The image model of a loaded checkpoint; under `bf16` the denoiser's weights are rounded, as in training."""
    autoencoder = load_autoencoder(loaded.spec, device)
    denoiser = loaded.denoiser.bfloat16() if precision == "bf16" else loaded.denoiser
    if compiled:
        compile_blocks(denoiser)
    uses_text = loaded.config["model"].get("condition_on", "class") != "class"
    text = load_text(loaded.spec, uses_text, device)
    return ImageModel(denoiser, loaded.objective, loaded.spec, autoencoder, device, text, guide)


def resized(model: ImageModel, trained: dict[str, Any], size: str) -> ImageModel:
    """The image model for images of another size, HEIGHTxWIDTH, or itself where that is empty.

    trained: the config of the denoiser's training. `InputError` where it does not take any size.
    """
    if not size:
        return model
    pixels, spec, config = Size.parse(size, "size"), model.spec, from_dict(ModelConfig, trained["model"])
    down = model.autoencoder.downsample
    if pixels.height % down or pixels.width % down:
        raise InputError(f"size={size} is not divisible by {down}, the factor of autoencoder {spec.autoencoder}")
    shape = (spec.latent_shape[0], pixels.height // down, pixels.width // down)
    if shape == spec.latent_shape:
        return model
    if spec.by_element:
        raise InputError(
            f"size={size} can't be drawn: latents of this model are whitened by the statistics of each element, which "
            f"are of {spec.image_shape[0]}x{spec.image_shape[1]} pixels alone; leave size out"
        )
    check_shapes(config, spec.shapes | {f"size={size}": shape})
    model.autoencoder.check_size(*pixels)
    return model.at(shape)


def examples_of(spec: LatentSpec) -> list[tuple[int, str]]:
    """Labels and captions that stand in the data's manifest as examples."""
    return [(int(label), caption) for label, caption in spec.text["examples"]] or [(0, "")]


def load_guide(config: DrawConfig, loaded: Loaded, device: torch.device) -> Guide | None:
    """The worse model of autoguidance, if there is one; `InputError` unless it knows the same latents and classes."""
    if config.guidance_inner != 1 and not loaded.config["model"].get("inner_head"):
        raise InputError(
            f"guidance_inner={config.guidance_inner} needs a model with an inner head, and {loaded.path} has none; "
            "train with model.inner_head, or leave guidance_inner=1"
        )
    if config.sampler == "mean_flow" and not loaded.config["model"].get("interval"):
        raise InputError(
            f"sampler=mean_flow needs a model of mean velocities, and {loaded.path} was trained without "
            "objective.mean_flow; use another sampler"
        )
    if not config.guide:
        return None
    other = load_denoiser(config.guide, config.guide_weights, device)
    for what in ("latent_shape", "classes", "mean_C", "std_C", "autoencoder_hash"):
        if getattr(other.spec, what) != getattr(loaded.spec, what):
            raise InputError(
                f"guide={config.guide} has another {what} than {loaded.path}; give a model trained on the same data"
            )
    if other.config["objective"].get("schedule") != loaded.config["objective"].get("schedule"):
        raise InputError(f"guide={config.guide} was trained with another objective.schedule than {loaded.path}")
    if (other.spec.text == {}) != (loaded.spec.text == {}):
        raise InputError(f"guide={config.guide} and {loaded.path} must both know captions, or neither")
    if other.spec.token != loaded.spec.token:
        raise InputError(
            f"guide={config.guide} and {loaded.path} must both denoise the same class token (align.token_weight), or "
            "neither"
        )
    denoiser = other.denoiser.bfloat16() if config.precision == "bf16" else other.denoiser
    return Guide(denoiser, other.objective, config.guide_scale, other.hash)


def load_text(spec: LatentSpec, uses_text: bool, device: torch.device) -> TextEncoder | None:
    """The encoder of a denoiser's captions, None where it is told of classes alone."""
    return reload_text_encoder(spec.text, device) if uses_text else None


def load_autoencoder(spec: LatentSpec, device: torch.device) -> Autoencoder:
    """The autoencoder that a denoiser was trained with; refuses one with other weights."""
    autoencoder = Autoencoder.load(spec.autoencoder).to(device)
    if autoencoder.hash != spec.autoencoder_hash:
        raise InputError(
            f"autoencoder {spec.autoencoder} has weights {autoencoder.hash[:12]}, but the data were encoded with "
            f"{spec.autoencoder_hash[:12]}; put the original weights back, or encode and train again"
        )
    return autoencoder


def labels_of(id_B: Sequence[int], spec: LatentSpec, config: ImageConfig) -> NDArray[np.int64]:
    """The class of each image id: int64 [B]."""
    ids, classes = np.asarray(id_B, np.int64), len(spec.classes)
    if config.labels == "balanced":
        return ids % classes
    if config.labels == "data" and not spec.class_counts:
        raise InputError("labels=data needs a checkpoint that knows its data's class counts; use balanced or random")
    counts = np.array(spec.class_counts if config.labels == "data" else [1] * classes, np.int64)
    place = rng.uniform(config.seed, Purpose.SAMPLE_LABEL, ids, 1)[:, 0] * counts.sum()
    return np.searchsorted(np.cumsum(counts), place, "right").astype(np.int64)


def default_labels(model: ImageModel, id_B: Sequence[int], config: ImageConfig) -> NDArray[np.int64]:
    """The class of each image id: of the example captions that it has too, or `labels_of`."""
    if examples := model.examples:
        return np.array([examples[i % len(examples)][0] for i in id_B], np.int64)
    return labels_of(id_B, model.spec, config)


@torch.no_grad()  # not inference mode: a training engine may own the denoiser
def sample_images(
    model: ImageModel,
    id_B: Sequence[int],
    config: ImageConfig,
    label_B: NDArray[np.int64] | None = None,
    prompts: Sequence[str] = (),
) -> Tensor:
    """Images of these ids as one batch: uint8 [B, H, W, C] on the CPU.

    Labels and captions are `labels_of` the ids, or those of the model's examples, unless given.
    """
    classes, shape = len(model.spec.classes), model.spec.latent_shape
    labels = torch.from_numpy(default_labels(model, id_B, config) if label_B is None else label_B)
    text = None
    if model.text is not None:
        captions = list(prompts) or [caption for _, caption in model.examples]
        content = model.text.encode([captions[i % len(captions)] for i in id_B])
        kind = torch.int64 if model.text.shape.vocabulary else torch.float32
        text = torch.from_numpy(content).to(model.device, kind)
    noise = torch.from_numpy(
        rng.normal(config.seed, Purpose.SAMPLE_NOISE, id_B, int(np.prod(shape)) + model.spec.token)
    )
    state_shape = (1, 1, noise.shape[1]) if model.spec.token else shape  # a class token follows the latent
    noise_BCHW = noise.view(-1, *state_shape).to(model.device)
    condition = Condition(label_B=labels.to(model.device), text=text)

    def step_noise(step: int) -> Tensor:
        key_B = np.asarray(id_B, np.int64) * MOST_STEPS + step
        return (
            torch.from_numpy(rng.normal(config.seed, Purpose.SAMPLE_STEP, key_B, noise[0].numel()))
            .view(noise_BCHW.shape)
            .to(model.device)
        )

    denoiser, guide = model.denoiser, model.guide
    if model.spec.token:
        denoiser, guide = Joined(denoiser, shape), guide and guide.seen_as(lambda other: Joined(other, shape))
    latent_BCHW = sample(denoiser, model.objective, noise_BCHW, condition, classes, config, step_noise, guide)
    if isinstance(denoiser, Joined):
        latent_BCHW = denoiser.latent(latent_BCHW)
    mean, std = (torch.from_numpy(x).to(model.device) for x in model.spec.whitening)
    return model.autoencoder.decode(latent_BCHW * std + mean, config.decode_slice).cpu()


def block_ids(k: int, block: int) -> range:
    """The ids of block k, always `block` of them."""
    return range(k * block, (k + 1) * block)


# ------------------------------------------------------------------------------------------------------- the program
