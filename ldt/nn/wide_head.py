"""The wide head of DDT (2504.05741), in the shape of RAE's DiT^DH (Zheng et al. 2510.11690).

A denoiser narrower than its tokens' numbers can't reproduce them: what it says of a token lies in as many dimensions as
it is wide. Widening all of it costs the square. Here the narrow blocks only say what each token is to become, and a few
wide ones see the noisy patches again and make it so:

    noisy patches [B, N, P] ─┬─ narrow blocks ──── z [B, N, D] ── silu(time + z) ── project ── s [B, N, W]
                             └─ project to W ── wide blocks, each token modulated by its s ── [B, N, P]
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldt.nn.block import Block, Modulation, PositionsByGrid, make_norm, make_position, modulate
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.embedding import AxialRotary


class WideHead(nn.Module):
    """Noisy patches [B, N, P], the narrow blocks' tokens z [B, N, D] and the time [B, D] → patches [B, N, P']."""

    def __init__(self, config: ModelConfig, channels: int, output: int, rows: int, columns: int) -> None:
        super().__init__()
        wide = wide_config(config)
        self.patchify = nn.Linear(channels * config.patch**2, wide.width)
        self.project = nn.Linear(config.width, wide.width)
        self.position = make_position(wide, rows, columns, 0)
        self.positions = PositionsByGrid(wide, rows, columns, 0)
        head_dim = wide.width // wide.heads
        self.rotary = AxialRotary(head_dim, rows, columns, 0, wide.rope_base) if wide.turns else None
        self.blocks = nn.ModuleList(Block(wide, first=i == 0, skip=False) for i in range(wide.depth))
        self.norm = make_norm(wide, wide.width, affine=False)
        self.modulation = Modulation(wide.width, 2 * wide.width)
        self.unpatchify = nn.Linear(wide.width, output * config.patch**2)

    def forward(
        self, patch_BNP: Tensor, z_BND: Tensor, time_BD: Tensor, checkpointed: int, grid: tuple[int, int]
    ) -> Tensor:
        """checkpointed: of how many blocks only what enters them is kept for the backward pass; grid: rows, columns."""
        s_BNW = self.project(F.silu(time_BD[:, None].to(z_BND.dtype) + z_BND))
        h_BNW = self.patchify(patch_BNP)
        position = self.positions.at(self.position, grid)
        if position is not None:
            h_BNW = h_BNW + position
        rotation = None if self.rotary is None else self.rotary.at(*grid)
        arguments = (s_BNW, None, None, None, rotation)
        for i, block in enumerate(self.blocks):
            if i < checkpointed and torch.is_grad_enabled():
                h_BNW, _ = checkpoint(block, h_BNW, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BNW, _ = block(h_BNW, *arguments)
        shift_BNW, scale_BNW = self.modulation(s_BNW).chunk(2, dim=-1)
        return self.unpatchify(modulate(self.norm(h_BNW), shift_BNW, scale_BNW))


def wide_config(config: ModelConfig) -> ModelConfig:
    """The head's blocks: as the others, but of its own width, modulated by what these say, and without their joints."""
    head = config.head
    return dataclasses.replace(
        config,
        width=head.width,
        inner_head=0,
        depth=head.depth,
        heads=head.heads,
        conditioning="adaln_zero",
        time_embedding="mlp",
        long_skips=False,
        value_residual=False,
        head=HeadConfig(),
    )
