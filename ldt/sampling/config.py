"""The keys that decide an image besides the checkpoint."""

from dataclasses import dataclass

from ldt.config_fields import check_seed, choice, path_field
from ldt.data.images.bucket_rule import Size
from ldt.diffusion.config import SamplerConfig
from ldt.errors import InputError

MOST_STEPS = 4096  # (image id, step) make one key of the noise that stochastic samplers add


@dataclass
class ImageConfig(SamplerConfig):
    """What decides image i besides the weights.

    `labels`: class i mod classes; or drawn by (seed, i), each class as likely as in the training data, or all equally.
    Of a block of images the autoencoder decodes `decode_slice` at once (0: all), because its memory grows with their
    pixels; the last bits depend on it.
    """

    seed: int = 0
    labels: str = choice("balanced", "data", "random")
    decode_slice: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.steps > MOST_STEPS:
            raise InputError(f"steps={self.steps} must be at most {MOST_STEPS}")
        if self.decode_slice < 0:
            raise InputError(
                f"decode_slice={self.decode_slice} must be a number of images that are decoded at once, or 0 for a "
                "whole block"
            )


@dataclass
class DrawConfig(ImageConfig):
    """Which weights make the images, in what size and arithmetic.

    `size`: HEIGHTxWIDTH in pixels, for a model that takes any; empty for that of the training data, of several that of
    the largest bucket.
    `guide`: another run, checkpoint or exported model, or this run's of another age, whose prediction is left behind
    (autoguidance, with `guide_scale`); `guide_weights`: ema, master, another average, or the width of one (0.2).
    `block`: images that the network makes at once; it is part of the last bits, as is `compile`, the denoiser's blocks
    by torch.compile, for large ones on a GPU.
    """

    block: int = 50
    weights: str = choice("ema", "master")
    size: str = ""
    guide: str = path_field("")
    guide_weights: str = "ema"
    guide_scale: float = 1.0
    precision: str = choice("fp32", "bf16")
    compile: bool = False

    def check_size(self) -> None:
        """`InputError` unless `size` can be one."""
        if self.size:
            Size.parse(self.size, "size")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_size()
        if bool(self.guide) != (self.guide_scale != 1):
            raise InputError(
                f"guide={self.guide or 'nothing'} and guide_scale={self.guide_scale} belong together: give a guide "
                "and a scale other than 1, such as 1.5"
            )
        if self.guide and self.sampler == "mean_flow":
            raise InputError(
                f"sampler=mean_flow takes mean velocities, which guide={self.guide} may not know; leave one of them out"
            )
        if self.block < 1:
            raise InputError(f"block={self.block} must be at least 1; it is how many images the network makes at once")
