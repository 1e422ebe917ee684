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
from torch.utils.checkpoint import checkpoint

from ldt.diffusion.condition import Condition, text_mask
from ldt.errors import InputError
from ldt.nn.attention import attend, choose_kernel
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import AxialRotary, TextEmbedding, TimeEmbedding, TimeSinusoids, sincos_2d
from ldt.nn.text_shape import TextShape


class Transformer(nn.Module):
    """latent [B, C, H, W], time [B], condition → prediction [B, C, H, W]."""

    def __init__(
        self, config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, text: TextShape | None = None
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        if height % config.patch or width % config.patch:
            raise InputError(f"model.patch={config.patch} does not divide the latent size {height}x{width}")
        self.config, self.channels = config, channels
        self.rows, self.columns = height // config.patch, width // config.patch
        in_context = config.conditioning == "in_context"
        self.prefix = (1 + config.uses_class + (text.length if text else 0)) if in_context else 0
        tokens = self.prefix + self.rows * self.columns
        output = channels * (2 if config.learned_sigma else 1)

        self.patchify = nn.Linear(channels * config.patch**2, config.width)
        make_time = TimeEmbedding if config.time_embedding == "mlp" else TimeSinusoids
        self.time = make_time(config.width, config.time, config.time_frequencies)
        self.label = nn.Embedding(classes + 1, config.width) if config.uses_class else None  # last row: the null label
        self.text = TextEmbedding(text, config.width) if text else None
        self.position = _position(config, self.rows, self.columns, tokens)
        head_dim = config.width // config.heads
        rotary = AxialRotary(head_dim, self.rows, self.columns, self.prefix) if config.positions == "rope" else None
        self.checkpointed = config.depth if config.activation_checkpointing else 0  # the first so many blocks
        half = config.depth // 2
        self.blocks = nn.ModuleList(
            Block(config, rotary, first=i == 0, skip=config.long_skips and i >= config.depth - half)
            for i in range(config.depth)
        )
        self.norm = make_norm(config, config.width, affine=in_context)
        if config.conditioning == "adaln_zero":
            self.modulation = Modulation(config.width, 2 * config.width)
        self.unpatchify = nn.Linear(config.width, output * config.patch**2)
        self.convolution = nn.Conv2d(output, output, 3, padding=1) if config.output_convolution else None
        if config.init == "dit":
            self._init_as_dit()
        else:
            self._init_as_uvit()

    def _init_as_dit(self) -> None:
        """Xavier for matrices, 0.02 for embeddings, zero for gates and for the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.time, TimeEmbedding):
            for layer in (self.time.up, self.time.down):
                nn.init.normal_(layer.weight, std=0.02)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.unpatchify.weight)

    def _init_as_uvit(self) -> None:
        """Normal of deviation 0.02 cut at ±2 for matrices and positions, standard normal for labels."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.position is not None and self.position.requires_grad:
            nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        p = self.config.patch
        patch_BNP = rearrange(x_BCHW, "b c (r p) (k q) -> b (r k) (c p q)", p=p, q=p)
        h_BND = self.patchify(patch_BNP.to(self.patchify.weight.dtype))
        modulation_BD = mask_BN = None
        if self.config.conditioning == "in_context":
            before_BMD, mask_BM = self._tokens(t_B, condition)
            h_BND = torch.cat([before_BMD.to(h_BND.dtype), h_BND], dim=1)
            if mask_BM is not None:
                mask_BN = F.pad(mask_BM, (0, h_BND.shape[1] - mask_BM.shape[1]), value=True)
        else:
            modulation_BD = F.silu(self._summary(t_B, condition))
        if self.position is not None:
            h_BND = h_BND + self.position
        h_BND = self._run_blocks(h_BND, modulation_BD, mask_BN)
        h_BND = self.norm(h_BND[:, self.prefix :])
        if modulation_BD is not None:
            shift_BD, scale_BD = self.modulation(modulation_BD).chunk(2, dim=-1)
            h_BND = modulate(h_BND, shift_BD, scale_BD)
        out_BNP = self.unpatchify(h_BND)
        out_BCHW = rearrange(out_BNP, "b (r k) (c p q) -> b c (r p) (k q)", r=self.rows, p=p, q=p)
        if self.convolution is not None:
            out_BCHW = self.convolution(out_BCHW)
        return out_BCHW[:, : self.channels]

    def _tokens(self, t_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Time, class and text tokens [B, M, D], and where they are not padding."""
        out = [self.time(t_B)[:, None]]
        if self.label is not None:
            out.append(self.label(condition.label_B)[:, None])
        if self.text is None:
            return torch.cat(out, dim=1), None
        assert condition.text is not None, "a denoiser of text needs text, zero for none"
        mask_BM = F.pad(text_mask(condition.text), (len(out), 0), value=True)
        return torch.cat([*out, self.text(condition.text)], dim=1), mask_BM

    def _summary(self, t_B: Tensor, condition: Condition) -> Tensor:
        """Time, class and the mean of the text's tokens in one vector: [B, D]."""
        out_BD = self.time(t_B)
        if self.label is not None:
            out_BD = out_BD + self.label(condition.label_B)
        if self.text is not None:
            assert condition.text is not None, "a denoiser of text needs text, zero for none"
            there_BM1 = text_mask(condition.text)[..., None]
            total_BD = (self.text(condition.text) * there_BM1).sum(1)
            out_BD = out_BD + total_BD / there_BM1.sum(1).clamp(min=1)
        return out_BD

    def _run_blocks(self, h_BND: Tensor, modulation_BD: Tensor | None, mask_BN: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        first_BKNE = None  # the first block's values, where the others want them
        for i, block in enumerate(self.blocks):
            skip_BND = skips.pop() if block.skip is not None else None
            arguments = (h_BND, modulation_BD, skip_BND, mask_BN, first_BKNE)
            if i < self.checkpointed and torch.is_grad_enabled():
                h_BND, value_BKNE = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BND, value_BKNE = block(*arguments)
            if i == 0 and self.config.value_residual:
                first_BKNE = value_BKNE
            if self.config.long_skips and i < self.config.depth // 2:
                skips.append(h_BND)
        return h_BND


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual; gated and modulated under adaLN-Zero.

    Returns the attention's values beside its output.
    """

    def __init__(self, config: ModelConfig, rotary: AxialRotary | None, first: bool, skip: bool) -> None:
        super().__init__()
        width = config.width
        adaptive = config.conditioning == "adaln_zero"
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = make_norm(config, width, affine=not adaptive)
        self.attention = Attention(config, rotary, mixes=config.value_residual and not first)
        self.norm2 = make_norm(config, width, affine=not adaptive)
        self.mlp = make_mlp(config)
        self.modulation = Modulation(width, 6 * width) if adaptive else None

    def forward(
        self,
        h_BND: Tensor,
        modulation_BD: Tensor | None,
        skip_BND: Tensor | None = None,
        mask_BN: Tensor | None = None,
        first_BKNE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.skip is not None:
            assert skip_BND is not None
            h_BND = self.skip(torch.cat([h_BND, skip_BND], dim=-1))
        if self.modulation is None:
            out_BND, value_BKNE = self.attention(self.norm1(h_BND), mask_BN, first_BKNE)
            h_BND = h_BND + out_BND
            return h_BND + self.mlp(self.norm2(h_BND)), value_BKNE
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation_BD).chunk(6, dim=-1)
        out_BND, value_BKNE = self.attention(modulate(self.norm1(h_BND), shift1, scale1), mask_BN, first_BKNE)
        h_BND = h_BND + gate1[:, None] * out_BND
        return h_BND + gate2[:, None] * self.mlp(modulate(self.norm2(h_BND), shift2, scale2)), value_BKNE


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised queries and keys and with rotary positions.

    With `mixes`, its values are mixed with the first block's in learned parts. Returns them beside its output.
    """

    def __init__(self, config: ModelConfig, rotary: AxialRotary | None, mixes: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.kernel = config.attention
        head_dim = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.out = nn.Linear(config.width, config.width)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.rotary = rotary
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes else None

    def forward(
        self, x_BND: Tensor, mask_BN: Tensor | None = None, first_BKNE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q_BKNE, k_BKNE, v_BKNE = rearrange(self.qkv(x_BND), "b n (s k e) -> s b k n e", s=3, k=self.heads)
        q_BKNE, k_BKNE = self.q_norm(q_BKNE), self.k_norm(k_BKNE)
        if self.rotary is not None:
            q_BKNE, k_BKNE = self.rotary(q_BKNE), self.rotary(k_BKNE)
        if self.mix is not None:
            assert first_BKNE is not None
            v_BKNE = self.mix[0] * v_BKNE + self.mix[1] * first_BKNE
        kernel = choose_kernel(self.kernel, x_BND.device, v_BKNE.dtype)
        out_BKNE = attend(q_BKNE, k_BKNE, v_BKNE, kernel, mask_BN)
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


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x·(1 + scale) + shift, the same for all tokens of a sample."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def make_mlp(config: ModelConfig) -> nn.Module:
    if config.mlp == "swiglu":
        return SwiGLU(config.width, config.mlp_ratio)
    return GELU(config.width, config.mlp_ratio, "none" if config.mlp == "gelu_erf" else "tanh")


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
