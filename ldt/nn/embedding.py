"""Embeddings of time and of position."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldt.diffusion.schedules import STEPS, step_of_time
from ldt.nn.text_shape import TextShape

FREQUENCIES = 256


def network_time(t_B: Tensor, clock: str) -> Tensor:
    """What a network sees of t in [0, 1]: 1000·t, t, or the step k of a discrete schedule (at least float32, [B])."""
    if clock == "steps":
        return step_of_time(t_B.float())
    t_B = _at_least_float32(t_B)
    return t_B if clock == "unit" else STEPS * t_B


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(time_B: Tensor, width: int, spacing: str = "dit") -> Tensor:
    """cos and sin of the time at width/2 frequencies from 1 to about 10⁻⁴ (Vaswani et al. 1706.03762): [B, width]."""
    half = width // 2
    span = half if spacing == "dit" else half - 1
    frequency = torch.exp(-math.log(10_000) / span * torch.arange(half, device=time_B.device, dtype=torch.float32))
    angle = time_B[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t_B in [0, 1] → [B, D]: sinusoids through a two-layer perceptron."""

    def __init__(self, width: int, clock: str = "continuous", spacing: str = "dit") -> None:
        super().__init__()
        self.clock, self.spacing = clock, spacing
        self.up = nn.Linear(FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        waves = sinusoids(network_time(t_B, self.clock), FREQUENCIES, self.spacing)
        return self.down(F.silu(self.up(waves.to(self.up.weight.dtype))))


class TimeSinusoids(nn.Module):
    """t_B in [0, 1] → [B, D]: the sinusoids themselves, as U-ViT's time token."""

    def __init__(self, width: int, clock: str, spacing: str) -> None:
        super().__init__()
        self.width, self.clock, self.spacing = width, clock, spacing

    def forward(self, t_B: Tensor) -> Tensor:
        return sinusoids(network_time(t_B, self.clock), self.width, self.spacing)


class SizeEmbedding(nn.Module):
    """Height and width of a latent → [1, D], to be added to the time's: SDXL's target size (Podell et al. 2307.01952).

    Sinusoids of both through one perceptron. The sizes that an image had before, and where it was cropped, which SDXL
    tells too, would have to be stored of every sample.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, height: int, width: int) -> Tensor:
        weight = self.up.weight
        sides = [torch.full((1,), float(side), device=weight.device) for side in (height, width)]
        waves = torch.cat([sinusoids(side, FREQUENCIES) for side in sides], dim=-1)
        return self.down(F.silu(self.up(waves.to(weight.dtype))))


class TextEmbedding(nn.Module):
    """Token numbers int64 [B, M] or features [B, M, F] → tokens [B, M, D], with learned positions."""

    def __init__(self, shape: TextShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        if shape.vocabulary:
            self.token = nn.Embedding(shape.vocabulary, width)
            nn.init.normal_(self.token.weight, std=0.02)
        else:
            self.norm = nn.LayerNorm(shape.width, elementwise_affine=False)  # encoders differ in scale by hundreds
            self.feature = nn.Linear(shape.width, width)
        self.position = nn.Parameter(torch.randn(shape.length, width) * 0.02)

    def forward(self, text: Tensor) -> Tensor:
        if self.shape.vocabulary:
            return self.token(text) + self.position
        return self.feature(self.norm(text.to(self.feature.weight.dtype))) + self.position


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, half of the width for each axis: [rows·columns, D]."""
    frequency = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    y = axis(rows)[:, None].expand(rows, columns, -1)
    x = axis(columns)[None].expand(rows, columns, -1)
    return rearrange(torch.cat([x, y], dim=-1), "r c d -> (r c) d").float()


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [N, E] by which `rotate` turns queries and keys."""


class AxialRotary(nn.Module):
    """Rotary positions (Su et al. 2104.09864) on a grid: half of each head turns with the row, half with the column.

    Tokens in front of the grid (`prefix`: time, class) have no position and do not turn. rows, columns: of the usual
    grid; others are made when they are asked for.
    """

    cos_NE: Tensor
    sin_NE: Tensor

    def __init__(self, head_dim: int, rows: int, columns: int, prefix: int, base: float = 100.0) -> None:
        super().__init__()
        self._head_dim, self._grid, self._prefix, self._base = head_dim, (rows, columns), prefix, base
        self._others: dict[tuple[object, ...], Rotation] = {}
        cos_NE, sin_NE = self._make(rows, columns)
        self.register_buffer("cos_NE", cos_NE, persistent=False)
        self.register_buffer("sin_NE", sin_NE, persistent=False)

    def at(self, rows: int, columns: int) -> Rotation:
        """The rotation of the prefix and a grid of tokens, on the device and in the precision of the model."""
        if (rows, columns) == self._grid:
            return self.cos_NE, self.sin_NE
        key = (rows, columns, self.cos_NE.device, self.cos_NE.dtype)
        if key not in self._others:
            cos_NE, sin_NE = self._make(rows, columns)
            self._others[key] = cos_NE.to(self.cos_NE), sin_NE.to(self.sin_NE)
        return self._others[key]

    def _make(self, rows: int, columns: int) -> Rotation:
        frequency = self._base ** -(torch.arange(self._head_dim // 4, dtype=torch.float64) / (self._head_dim // 4))
        y = torch.arange(rows, dtype=torch.float64)[:, None, None].expand(rows, columns, 1) * frequency
        x = torch.arange(columns, dtype=torch.float64)[None, :, None].expand(rows, columns, 1) * frequency
        angle = rearrange(torch.cat([y, x], dim=-1), "r c e -> (r c) e")
        angle = torch.cat([torch.zeros(self._prefix, angle.shape[1], dtype=angle.dtype), angle])
        return torch.cat([angle.cos()] * 2, dim=-1).float(), torch.cat([angle.sin()] * 2, dim=-1).float()


def rotate(x_BKNE: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys turned by their tokens' positions."""
    cos_NE, sin_NE = rotation
    first, second = _at_least_float32(x_BKNE).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (_at_least_float32(x_BKNE) * cos_NE + turned * sin_NE).to(x_BKNE.dtype)
