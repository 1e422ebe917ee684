"""The shape of a denoiser."""

import math
from dataclasses import dataclass, field

from ldt.config_fields import choice, section
from ldt.errors import InputError

DEEPEST, WIDEST = 1024, 1 << 17  # above any published model: a typo must not fill the memory


@dataclass
class UNetConfig:
    """The UNet arm; the defaults are latent-diffusion's `cin` shape (Rombach et al. 2112.10752, table 15).

    `channels`: at full resolution; `multipliers`: of them at each level, every one half as large as the one before;
    `blocks`: residual blocks a level; `head_channels`: of every attention head; `context`: width of the class and text
    tokens that cross-attention sees.
    """

    channels: int = 256
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    blocks: int = 2
    head_channels: int = 32
    context: int = 512

    def __post_init__(self) -> None:
        for key in ("channels", "blocks", "head_channels", "context"):
            if getattr(self, key) < 1:
                raise InputError(f"model.unet.{key}={getattr(self, key)} must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"model.unet.multipliers={self.multipliers} must be one or more positive numbers")
        if self.blocks * len(self.multipliers) > DEEPEST:
            raise InputError(f"model.unet.blocks={self.blocks} at {len(self.multipliers)} levels are too many")
        if self.channels % self.head_channels:
            raise InputError(
                f"model.unet.head_channels={self.head_channels} does not divide model.unet.channels={self.channels}"
            )

    @property
    def groups(self) -> int:
        """Groups of the group norms: 32, or the largest divisor of it that divides the channels."""
        return math.gcd(self.channels, 32)


@dataclass
class HeadConfig:
    """`depth` wide blocks of `width` and `heads` after the Transformer's own, which see the noisy patches again; none
    with depth 0. For latents whose tokens hold more numbers than the Transformer is wide (docs/models.md)."""

    depth: int = 0
    width: int = 2048
    heads: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= DEEPEST:
            raise InputError(f"model.head.depth={self.depth} must be between 0 (no head) and {DEEPEST}")
        for key in ("width", "heads"):
            if not 1 <= getattr(self, key) <= WIDEST:
                raise InputError(f"model.head.{key}={getattr(self, key)} must be between 1 and {WIDEST}")
        if self.width % self.heads:
            raise InputError(f"model.head.heads={self.heads} does not divide model.head.width={self.width}")


@dataclass
class ModelConfig:
    """Width, depth, heads and patch size as in DiT's tables; the rest are the block's options.

    `condition_on`: what it is told besides the time. `time`: the network's clock, 1000·t, the step k = 1000·t − 1 of a
    schedule of 1000 steps, or t itself (unit), of which derivatives are smooth; `time_frequencies`: of its sinusoids,
    10⁴^(−i/128) or, as in diffusers, 10⁴^(−i/127); `time_embedding`: through a perceptron, or the bare sinusoids.
    `rope_base`: of the frequencies of rotary positions, alone (`rope`) or beside fixed ones that are added
    (`rope_sincos`). `learned_sigma`: as many output channels again, which nothing here trains or uses: for weights from
    elsewhere. `activation_checkpointing`: keep only what enters each block and compute the rest again in the backward
    pass. `value_residual`: every block's values are mixed with the first one's (Zhou et al. 2410.17897). `interval`: it
    is also told over which time back from t a velocity is averaged, for `objective.mean_flow`. `size_conditioning`: and
    how high and wide the latent is, for data in buckets. `inner_head`: after how
    many blocks a second output is read and trained, for `guidance_inner` (0: none). `head`: wide blocks at the end.
    `unet` belongs to name=unet, which ignores the Transformer's keys.
    """

    name: str = choice("transformer", "unet")
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    condition_on: str = choice("class", "text", "class_and_text")
    conditioning: str = choice("in_context", "adaln_zero")
    long_skips: bool = False
    positions: str = choice("rope", "learned", "sincos", "rope_sincos")
    rope_base: float = 100.0
    norm: str = choice("rms", "layer")
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = True
    mlp: str = choice("swiglu", "gelu", "gelu_erf")
    mlp_ratio: float = 4.0
    value_residual: bool = False
    time: str = choice("continuous", "steps", "unit")
    time_frequencies: str = choice("dit", "diffusers")
    time_embedding: str = choice("mlp", "sinusoids")
    output_convolution: bool = False
    learned_sigma: bool = False
    init: str = choice("dit", "uvit")
    attention: str = choice("auto", "sdpa", "cudnn", "flash", "reference")
    activation_checkpointing: bool = False
    interval: bool = False
    size_conditioning: bool = False
    inner_head: int = 0
    head: HeadConfig = section(HeadConfig)
    unet: UNetConfig = section(UNetConfig)

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch"):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)} must be at least 1")
        if int(self.width * self.mlp_ratio) < 1:
            raise InputError(f"model.mlp_ratio={self.mlp_ratio} must be positive, and large enough for one channel")
        for key, most in (("width", WIDEST), ("depth", DEEPEST), ("mlp_ratio", WIDEST)):
            if getattr(self, key) > most:
                raise InputError(f"model.{key}={getattr(self, key)} must be at most {most}")
        if self.width % self.heads:
            raise InputError(f"model.heads={self.heads} does not divide model.width={self.width}")
        for key in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"model.{key}={getattr(self, key)} must be a positive number")
        if self.turns and self.width // self.heads % 4:
            raise InputError(
                f"model.positions={self.positions} needs a head size divisible by 4, not {self.width // self.heads}; "
                "change model.width or model.heads"
            )
        if self.adds_sincos and self.width % 4:
            raise InputError(f"model.positions={self.positions} needs model.width divisible by 4, not {self.width}")
        if not 0 <= self.inner_head < self.depth or (self.inner_head and self.name != "transformer"):
            raise InputError(
                f"model.inner_head={self.inner_head} must be 0 (none) or the number of a transformer's block below "
                f"model.depth={self.depth}"
            )
        if self.interval and (self.name != "transformer" or self.time == "steps" or self.inner_head):
            raise InputError(
                "model.interval=true needs model.name=transformer, model.time=unit (or continuous) and "
                "model.inner_head=0"
            )
        if self.size_conditioning and self.name != "transformer":
            raise InputError("model.size_conditioning=true needs model.name=transformer, which takes several sizes")
        if self.head.depth:
            self._check_head()
        if self.name == "unet" and self.attention not in ("auto", "sdpa"):
            raise InputError(
                f"model.attention={self.attention} is the transformer's; model.name=unet takes auto or sdpa"
            )
        if self.time_embedding == "sinusoids" and (self.conditioning != "in_context" or self.width % 2):
            raise InputError(
                "model.time_embedding=sinusoids is a token of its own: it needs model.conditioning=in_context and an "
                "even model.width; else use model.time_embedding=mlp"
            )

    def _check_head(self) -> None:
        width, heads = self.head.width, self.head.heads
        if self.name != "transformer":
            raise InputError(
                f"model.head.depth={self.head.depth} is the transformer's; with model.name=unet leave it 0"
            )
        if self.turns and width // heads % 4:
            raise InputError(
                f"model.positions={self.positions} needs a head size divisible by 4, not {width // heads} in the wide "
                "head; change model.head.width or model.head.heads"
            )
        if self.adds_sincos and width % 4:
            raise InputError(f"model.positions={self.positions} needs model.head.width divisible by 4, not {width}")

    @property
    def turns(self) -> bool:
        """Whether positions are rotary, on top of others or alone."""
        return self.positions in ("rope", "rope_sincos")

    @property
    def adds_sincos(self) -> bool:
        """Whether fixed sine-cosine positions are added to the tokens."""
        return self.positions in ("sincos", "rope_sincos")

    @property
    def uses_class(self) -> bool:
        return self.condition_on != "text"

    @property
    def uses_text(self) -> bool:
        return self.condition_on != "class"
