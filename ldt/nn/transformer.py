"""The denoising Transformer: latent patches as tokens, conditioned in context or through adaLN-Zero.

`in_context` is the scheme of "Exploring Transformer Backbones for Image Diffusion Models" (2212.14678): time and class
are tokens beside the image tokens and plain self-attention fuses them; with `long_skips` the first half's activations
also join the second half's, as in U-ViT (Bao et al. 2209.12152). `adaln_zero` is DiT's (Peebles and Xie 2212.09748):
the condition scales, shifts and gates every block, which starts as the identity.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldt.errors import InputError
from ldt.nn.attention import attend, choose_kernel
from ldt.nn.condition import Condition
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import AxialRotary, TimeEmbedding, sincos_2d


class Transformer(nn.Module):
    """latent [B, C, H, W], time [B], condition → prediction [B, C, H, W]."""

    def __init__(self, config: ModelConfig, latent_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = latent_shape
        if height % config.patch or width % config.patch:
            raise InputError(f"model.patch={config.patch} does not divide the latent size {height}x{width}")
        self.config = config
        self.rows, self.columns = height // config.patch, width // config.patch
        self.prefix = 2 if config.conditioning == "in_context" else 0
        tokens = self.prefix + self.rows * self.columns

        self.patchify = nn.Linear(channels * config.patch**2, config.width)
        self.time = TimeEmbedding(config.width)
        self.label = nn.Embedding(classes + 1, config.width)  # the last row is the null label
        self.position = _position(config, self.rows, self.columns, tokens)
        head_dim = config.width // config.heads
        rotary = AxialRotary(head_dim, self.rows, self.columns, self.prefix) if config.positions == "rope" else None
        half = config.depth // 2
        self.blocks = nn.ModuleList(
            Block(config, rotary, skip=config.long_skips and i >= config.depth - half) for i in range(config.depth)
        )
        self.norm = make_norm(config, config.width, affine=config.conditioning == "in_context")
        if config.conditioning == "adaln_zero":
            self.modulation = Modulation(config.width, 2 * config.width)
        self.unpatchify = nn.Linear(config.width, channels * config.patch**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier for matrices, 0.02 for embeddings, zero for gates and for the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time.up, self.time.down):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.label.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.unpatchify.weight)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        p = self.config.patch
        patch_BNP = rearrange(x_BCHW, "b c (r p) (k q) -> b (r k) (c p q)", p=p, q=p)
        h_BND = self.patchify(patch_BNP.to(self.patchify.weight.dtype))
        time_BD, label_BD = self.time(t_B), self.label(condition.label_B)
        modulation_BD = None
        if self.config.conditioning == "in_context":
            h_BND = torch.cat([time_BD[:, None], label_BD[:, None], h_BND], dim=1)
        else:
            modulation_BD = F.silu(time_BD + label_BD)
        if self.position is not None:
            h_BND = h_BND + self.position
        h_BND = self._run_blocks(h_BND, modulation_BD)
        h_BND = self.norm(h_BND[:, self.prefix :])
        if modulation_BD is not None:
            shift_BD, scale_BD = self.modulation(modulation_BD).chunk(2, dim=-1)
            h_BND = modulate(h_BND, shift_BD, scale_BD)
        out_BNP = self.unpatchify(h_BND)
        return rearrange(out_BNP, "b (r k) (c p q) -> b c (r p) (k q)", r=self.rows, p=p, q=p)

    def _run_blocks(self, h_BND: Tensor, modulation_BD: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h_BND = block(h_BND, modulation_BD, skips.pop() if block.skip is not None else None)
            if self.config.long_skips and i < self.config.depth // 2:
                skips.append(h_BND)
        return h_BND


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual; gated and modulated under adaLN-Zero."""

    def __init__(self, config: ModelConfig, rotary: AxialRotary | None, skip: bool) -> None:
        super().__init__()
        width = config.width
        adaptive = config.conditioning == "adaln_zero"
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = make_norm(config, width, affine=not adaptive)
        self.attention = Attention(config, rotary)
        self.norm2 = make_norm(config, width, affine=not adaptive)
        self.mlp = SwiGLU(width, config.mlp_ratio) if config.mlp == "swiglu" else GELU(width, config.mlp_ratio)
        self.modulation = Modulation(width, 6 * width) if adaptive else None

    def forward(self, h_BND: Tensor, modulation_BD: Tensor | None, skip_BND: Tensor | None) -> Tensor:
        if self.skip is not None:
            assert skip_BND is not None
            h_BND = self.skip(torch.cat([h_BND, skip_BND], dim=-1))
        if self.modulation is None:
            h_BND = h_BND + self.attention(self.norm1(h_BND))
            return h_BND + self.mlp(self.norm2(h_BND))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation_BD).chunk(6, dim=-1)
        h_BND = h_BND + gate1[:, None] * self.attention(modulate(self.norm1(h_BND), shift1, scale1))
        return h_BND + gate2[:, None] * self.mlp(modulate(self.norm2(h_BND), shift2, scale2))


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised queries and keys and with rotary positions."""

    def __init__(self, config: ModelConfig, rotary: AxialRotary | None) -> None:
        super().__init__()
        self.heads = config.heads
        self.kernel = config.attention
        head_dim = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.rotary = rotary

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BKNE, k_BKNE, v_BKNE = rearrange(self.qkv(x_BND), "b n (s k e) -> s b k n e", s=3, k=self.heads)
        q_BKNE, k_BKNE = self.q_norm(q_BKNE), self.k_norm(k_BKNE)
        if self.rotary is not None:
            q_BKNE, k_BKNE = self.rotary(q_BKNE), self.rotary(k_BKNE)
        kernel = choose_kernel(self.kernel, x_BND.device, v_BKNE.dtype)
        out_BKNE = attend(q_BKNE, k_BKNE, v_BKNE, kernel)
        return self.out(rearrange(out_BKNE, "b k n e -> b n (k e)"))


class GELU(nn.Module):
    """Two-layer perceptron with the tanh GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, int(width * ratio))
        self.down = nn.Linear(int(width * ratio), width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BND), approximate="tanh"))


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


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x·(1 + scale) + shift, the same for all tokens of a sample."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def make_norm(config: ModelConfig, width: int, affine: bool) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=1e-6, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


def _position(config: ModelConfig, rows: int, columns: int, tokens: int) -> nn.Parameter | None:
    """Positions added to the tokens: learned for all of them, or fixed sine-cosine for the image's."""
    if config.positions == "learned":
        return nn.Parameter(torch.randn(tokens, config.width) * 0.02)
    if config.positions == "sincos":
        prefix = torch.zeros(tokens - rows * columns, config.width)
        return nn.Parameter(torch.cat([prefix, sincos_2d(config.width, rows, columns)]), requires_grad=False)
    return None
