"""The shape of a denoiser."""

from dataclasses import dataclass

from ldt.errors import InputError
from ldt.nn.attention import KERNELS
from ldt.options import choice


@dataclass
class ModelConfig:
    """Width, depth, heads and patch size as in DiT's tables; the rest are the block's options."""

    name: str = choice("transformer")
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    conditioning: str = choice("in_context", "adaln_zero")
    long_skips: bool = False
    positions: str = choice("rope", "learned", "sincos")
    norm: str = choice("rms", "layer")
    qk_norm: bool = True
    mlp: str = choice("swiglu", "gelu")
    mlp_ratio: float = 4.0
    attention: str = choice(*KERNELS)

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch"):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.width % self.heads:
            raise InputError(f"model.heads={self.heads} does not divide model.width={self.width}")
        if self.positions == "rope" and self.width // self.heads % 4:
            raise InputError(
                f"model.positions=rope needs a head size divisible by 4, not {self.width // self.heads}; "
                "change model.width or model.heads"
            )
        if self.positions == "sincos" and self.width % 4:
            raise InputError(f"model.positions=sincos needs model.width divisible by 4, not {self.width}")
