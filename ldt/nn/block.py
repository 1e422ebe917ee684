"""The parts of a denoising Transformer's blocks: attention, perceptrons, modulation by the condition."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldt.errors import InputError
from ldt.nn.attention import Padding, attend, choose_kernel
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import Rotation, rotate, sincos_2d


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual; gated and modulated under adaLN-Zero.

    modulation_BMD: the condition that modulates, one for all tokens (M = 1) or one for each (M = N); rotation: of the
    tokens' positions, where these are rotary.
    Returns the attention's values beside its output.
    """

    def __init__(self, config: ModelConfig, first: bool, skip: bool) -> None:
        super().__init__()
        width = config.width
        adaptive = config.conditioning == "adaln_zero"
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = make_norm(config, width, affine=not adaptive)
        self.attention = Attention(config, mixes=config.value_residual and not first)
        self.norm2 = make_norm(config, width, affine=not adaptive)
        self.mlp = make_mlp(config)
        self.modulation = Modulation(width, 6 * width) if adaptive else None

    def forward(
        self,
        h_BND: Tensor,
        modulation_BMD: Tensor | None,
        skip_BND: Tensor | None = None,
        padding: Padding | None = None,
        first_BKNE: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.skip is not None:
            assert skip_BND is not None
            h_BND = self.skip(torch.cat([h_BND, skip_BND], dim=-1))
        if self.modulation is None:
            out_BND, value_BKNE = self.attention(self.norm1(h_BND), padding, first_BKNE, rotation)
            h_BND = h_BND + out_BND
            return h_BND + self.mlp(self.norm2(h_BND)), value_BKNE
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation_BMD).chunk(6, dim=-1)
        normed_BND = modulate(self.norm1(h_BND), shift1, scale1)
        out_BND, value_BKNE = self.attention(normed_BND, padding, first_BKNE, rotation)
        h_BND = h_BND + gate1 * out_BND
        return h_BND + gate2 * self.mlp(modulate(self.norm2(h_BND), shift2, scale2)), value_BKNE


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised queries and keys and with rotary positions.

    With `mixes`, its values are mixed with the first block's in learned parts. Returns them beside its output.
    """

    def __init__(self, config: ModelConfig, mixes: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.kernel = config.attention
        head_dim = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.out = nn.Linear(config.width, config.width)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes else None

    def forward(
        self,
        x_BND: Tensor,
        padding: Padding | None = None,
        first_BKNE: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        q_BKNE, k_BKNE, v_BKNE = rearrange(self.qkv(x_BND), "b n (s k e) -> s b k n e", s=3, k=self.heads)
        q_BKNE, k_BKNE = self.q_norm(q_BKNE), self.k_norm(k_BKNE)
        if rotation is not None:
            q_BKNE, k_BKNE = rotate(q_BKNE, rotation), rotate(k_BKNE, rotation)
        if self.mix is not None:
            assert first_BKNE is not None
            v_BKNE = self.mix[0] * v_BKNE + self.mix[1] * first_BKNE
        kernel = choose_kernel(self.kernel, x_BND.device, v_BKNE.dtype)
        out_BKNE = attend(q_BKNE, k_BKNE, v_BKNE, kernel, padding)
        return self.out(rearrange(out_BKNE, "b k n e -> b n (k e)")), v_BKNE


class GELU(nn.Module):
    """Two-layer perceptron with the GELU, by default in its tanh form."""

    def __init__(self, width: int, ratio: float, form: str = "tanh") -> None:
        super().__init__()
        self.form = form
        self.up = nn.Linear(width, int(width * ratio))
        self.down = nn.Linear(int(width * ratio), width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BND), approximate=self.form))


class SwiGLU(nn.Module):
    """Gated perceptron (Shazeer 2002.05202); two thirds of the hidden width, so the parameters equal GELU's."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = -(-int(width * ratio * 2 / 3) // 16) * 16
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        gate, value = self.up(x_BND).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Modulation(nn.Linear):
    """The condition's shifts, scales and gates; starts at zero."""


def modulate(x_BND: Tensor, shift_BMD: Tensor, scale_BMD: Tensor) -> Tensor:
    """x·(1 + scale) + shift, the same for all tokens of a sample (M = 1) or of each its own (M = N)."""
    return x_BND * (1 + scale_BMD) + shift_BMD


def make_mlp(config: ModelConfig) -> nn.Module:
    if config.mlp == "swiglu":
        return SwiGLU(config.width, config.mlp_ratio)
    return GELU(config.width, config.mlp_ratio, "none" if config.mlp == "gelu_erf" else "tanh")


def make_norm(config: ModelConfig, width: int, affine: bool) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=affine)


class OutputNorm(nn.Module):
    """What stands before an output layer: a norm, which the condition shifts and scales where it modulates blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        modulated = config.conditioning == "adaln_zero"
        self.norm = make_norm(config, config.width, affine=not modulated)
        self.modulation = Modulation(config.width, 2 * config.width) if modulated else None

    def normed(self, h_BND: Tensor, modulation_B1D: Tensor | None) -> Tensor:
        """Tokens [B, N, D], ready for the layer."""
        h_BND = self.norm(h_BND)
        if self.modulation is None:
            return h_BND
        assert modulation_B1D is not None
        return modulate(h_BND, *self.modulation(modulation_B1D).chunk(2, dim=-1))


def make_position(config: ModelConfig, rows: int, columns: int, prefix: int) -> nn.Parameter | None:
    """Positions added to the tokens: learned for all of them, or fixed sine-cosine for the image's."""
    if config.positions == "learned":
        return nn.Parameter(torch.randn(prefix + rows * columns, config.width) * 0.02)
    if config.adds_sincos:
        return nn.Parameter(_fixed_position(config.width, rows, columns, prefix), requires_grad=False)
    return None


class PositionsByGrid:
    """What `make_position` has given to a module, for other grids than that one too."""

    def __init__(self, config: ModelConfig, rows: int, columns: int, prefix: int) -> None:
        self._config, self._grid, self._prefix = config, (rows, columns), prefix
        self._others: dict[tuple[object, ...], Tensor] = {}

    def at(self, position: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
        """position: of the usual grid. What was made for another one is kept for the next time."""
        if position is None or grid == self._grid:
            return position
        if self._config.positions == "learned":
            usual, other = ("x".join(map(str, g)) for g in (self._grid, grid))
            raise InputError(
                f"model.positions=learned knows the grid of {usual} tokens alone, not {other}; train with "
                "model.positions=rope or sincos for several sizes"
            )
        key = (grid, position.device, position.dtype)
        if key not in self._others:
            self._others[key] = _fixed_position(self._config.width, *grid, self._prefix).to(position)
        return self._others[key]


def _fixed_position(width: int, rows: int, columns: int, prefix: int) -> Tensor:
    return torch.cat([torch.zeros(prefix, width), sincos_2d(width, rows, columns)])
