"""Embeddings of time and of position."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FREQUENCIES = 256


class TimeEmbedding(nn.Module):
    """t_B in [0, 1] → [B, D]: sinusoids of 1000·t (Vaswani et al. 1706.03762) through a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t_B.device, dtype=torch.float32))
        angle = 1000 * t_B.float()[:, None] * frequency
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.down(F.silu(self.up(sinusoids.to(self.up.weight.dtype))))


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, half of the width for each axis: [rows·columns, D]."""
    frequency = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    y = axis(rows)[:, None].expand(rows, columns, -1)
    x = axis(columns)[None].expand(rows, columns, -1)
    return rearrange(torch.cat([x, y], dim=-1), "r c d -> (r c) d").float()


class AxialRotary(nn.Module):
    """Rotary positions (Su et al. 2104.09864) on a grid: half of each head turns with the row, half with the column.

    Tokens in front of the grid (`prefix`: time, class) have no position and do not turn.
    """

    cos_NE: Tensor
    sin_NE: Tensor

    def __init__(self, head_dim: int, rows: int, columns: int, prefix: int) -> None:
        super().__init__()
        frequency = 100 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        y = torch.arange(rows, dtype=torch.float64)[:, None, None].expand(rows, columns, 1) * frequency
        x = torch.arange(columns, dtype=torch.float64)[None, :, None].expand(rows, columns, 1) * frequency
        angle = rearrange(torch.cat([y, x], dim=-1), "r c e -> (r c) e")
        angle = torch.cat([torch.zeros(prefix, angle.shape[1], dtype=angle.dtype), angle])
        self.register_buffer("cos_NE", torch.cat([angle.cos()] * 2, dim=-1).float(), persistent=False)
        self.register_buffer("sin_NE", torch.cat([angle.sin()] * 2, dim=-1).float(), persistent=False)

    def forward(self, x_BKNE: Tensor) -> Tensor:
        first, second = x_BKNE.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (x_BKNE.float() * self.cos_NE + turned * self.sin_NE).to(x_BKNE.dtype)
