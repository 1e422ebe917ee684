"""The keys that decide an image besides the checkpoint."""

from dataclasses import dataclass

from ldt.config_fields import check_seed, choice
from ldt.diffusion.config import SamplerConfig
from ldt.errors import InputError

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
