"""The denoising Transformer: latent patches as tokens, conditioned in context or through adaLN-Zero.

`in_context` is the scheme of "Exploring Transformer Backbones for Image Diffusion Models" (2212.14678): time and class
are tokens beside the image tokens and plain self-attention fuses them; with `long_skips` the first half's activations
also join the second half's, as in U-ViT (Bao et al. 2209.12152). `adaln_zero` is DiT's (Peebles and Xie 2212.09748):
the condition scales, shifts and gates every block, which starts as the identity. With `head`, wide blocks follow
(`ldt.nn.wide_head`).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldt.diffusion.condition import Condition, text_mask
from ldt.errors import InputError
from ldt.nn.align import Projector
from ldt.nn.attention import Padding, choose_kernel, padding_of
from ldt.nn.block import Block, Modulation, PositionsByGrid, make_norm, make_position, modulate
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import AxialRotary, Rotation, SizeEmbedding, TextEmbedding, TimeEmbedding, TimeSinusoids
from ldt.nn.entangled import ClassToken, with_unturned
from ldt.nn.inner_head import InnerHead
from ldt.nn.text_shape import TextShape
from ldt.nn.wide_head import WideHead


class Transformer(nn.Module):
    """latent [B, C, H, W], time [B], condition → prediction [B, C, H, W].

    Height and width may be others than those of latent_shape, unless positions are learned.
    """

    def __init__(
        self, config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, text: TextShape | None = None
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.config, self.channels = config, channels
        self.rows, self.columns = grid_of(config.patch, height, width)
        in_context = config.conditioning == "in_context"
        self.prefix = (1 + config.uses_class + (text.length if text else 0)) if in_context else 0
        output = channels * (2 if config.learned_sigma else 1)

        self.patchify = nn.Linear(channels * config.patch**2, config.width)
        make_time = TimeEmbedding if config.time_embedding == "mlp" else TimeSinusoids
        self.time = make_time(config.width, config.time, config.time_frequencies)
        self.label = nn.Embedding(classes + 1, config.width) if config.uses_class else None  # last row: the null label
        self.text = TextEmbedding(text, config.width) if text else None
        grid = (self.rows, self.columns, self.prefix)
        self.position = make_position(config, *grid)
        self.positions = PositionsByGrid(config, *grid)
        head_dim = config.width // config.heads
        self.rotary = AxialRotary(head_dim, *grid, config.rope_base) if config.turns else None
        # the first so many blocks, and after them the wide head's
        self.checkpointed = config.depth + config.head.depth if config.activation_checkpointing else 0
        half = config.depth // 2
        self.blocks = nn.ModuleList(
            Block(config, first=i == 0, skip=config.long_skips and i >= config.depth - half)
            for i in range(config.depth)
        )
        self.inner = InnerHead(config, output) if config.inner_head else None
        self.projector: Projector | None = None  # in training alone, see `ldt.nn.align.add_projector`
        self.class_token: ClassToken | None = None  # where the data's targets give one, see `ldt.nn.build`
        self.head = None
        if config.head.depth:
            self.head = WideHead(config, channels, output, self.rows, self.columns)
        else:
            self.norm = make_norm(config, config.width, affine=in_context)
            if not in_context:
                self.modulation = Modulation(config.width, 2 * config.width)
            self.unpatchify = nn.Linear(config.width, output * config.patch**2)
        self.convolution = nn.Conv2d(output, output, 3, padding=1) if config.output_convolution else None
        self.interval = TimeEmbedding(config.width, config.time, config.time_frequencies) if config.interval else None
        self.size = SizeEmbedding(config.width) if config.size_conditioning else None
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
        if self.interval is not None:
            nn.init.normal_(self.interval.up.weight, std=0.02)
            nn.init.zeros_(self.interval.down.weight)
        if self.size is not None:
            nn.init.zeros_(self.size.down.weight)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.weight)
        nn.init.zeros_((self.head or self).unpatchify.weight)
        if self.inner is not None:
            nn.init.zeros_(self.inner.unpatchify.weight)

    def _init_as_uvit(self) -> None:
        """Normal of deviation 0.02 cut at ±2 for matrices and positions, standard normal for labels."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for position in (self.position, self.head.position if self.head else None):
            if position is not None and position.requires_grad:
                nn.init.trunc_normal_(position, std=0.02)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        condition: Condition,
        inner: bool = False,
        r_B: Tensor | None = None,
        aligned: bool = False,
        token_BF: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The prediction; then, with `inner`, that of the inner head; with `aligned`, that of the target; and with
        `token_BF`, that of the class token.

        r_B: the velocity is to be the mean over [r, t]; without it that at t. token_BF: the noisy class token, for a
        denoiser that has one.
        """
        assert (token_BF is None) == (self.class_token is None), "a class token, and a denoiser that has one"
        p = self.config.patch
        grid = grid_of(p, *x_BCHW.shape[2:])
        patch_BNP = rearrange(x_BCHW, "b c (r p) (k q) -> b (r k) (c p q)", p=p, q=p)
        patch_BNP = patch_BNP.to(self.patchify.weight.dtype)
        h_BND = self.patchify(patch_BNP)
        time_BD = self.time(t_B)
        if self.interval is not None:
            time_BD = time_BD + self.interval(torch.zeros_like(t_B) if r_B is None else t_B - r_B)
        if self.size is not None:
            time_BD = time_BD + self.size(*x_BCHW.shape[2:])
        modulation_B1D = mask_BM = padding = None
        if self.config.conditioning == "in_context":
            before_BMD, mask_BM = self._tokens(time_BD, condition)
            h_BND = torch.cat([before_BMD.to(h_BND.dtype), h_BND], dim=1)
        else:
            modulation_B1D = F.silu(self._summary(time_BD, condition))[:, None]
        position = self.positions.at(self.position, grid)
        if position is not None:
            h_BND = h_BND + position
        rotation = None if self.rotary is None else self.rotary.at(*grid)
        if self.class_token is not None and token_BF is not None:
            h_BND = torch.cat([h_BND, self.class_token(token_BF)], dim=1)
            rotation = rotation and with_unturned(rotation)
        if mask_BM is not None:
            mask_BN = F.pad(mask_BM, (0, h_BND.shape[1] - mask_BM.shape[1]), value=True)
            padding = padding_of(mask_BN, choose_kernel(self.config.attention, h_BND.device, h_BND.dtype))
        h_BND, kept = self._run_blocks(h_BND, modulation_B1D, padding, rotation)
        image, last_B1D = slice(self.prefix, self.prefix + grid[0] * grid[1]), h_BND[:, -1:]
        h_BND = h_BND[:, image]
        if self.head is not None:
            out_BNP = self.head(patch_BNP, h_BND, time_BD, max(0, self.checkpointed - self.config.depth), grid)
        else:
            h_BND = self.norm(h_BND)
            if modulation_B1D is not None:
                shift_B1D, scale_B1D = self.modulation(modulation_B1D).chunk(2, dim=-1)
                h_BND = modulate(h_BND, shift_B1D, scale_B1D)
            out_BNP = self.unpatchify(h_BND)
        outputs = [self._image(out_BNP, grid)]
        if inner:
            assert self.inner is not None, "a denoiser without an inner head"
            middle_BND = kept[self.config.inner_head][:, image]
            outputs.append(self._image(self.inner(middle_BND, modulation_B1D), grid))
        if aligned:
            assert self.projector is not None, "a denoiser that is not aligned"
            token_BND = kept[self.projector.block][:, image]
            outputs.append(self.projector(rearrange(token_BND, "b (r k) d -> b d r k", r=grid[0])))
        if self.class_token is not None:
            outputs.append(self.class_token.read(last_B1D, modulation_B1D))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _image(self, out_BNP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches as a prediction [B, C, H, W]."""
        p = self.config.patch
        out_BCHW = rearrange(out_BNP, "b (r k) (c p q) -> b c (r p) (k q)", r=grid[0], p=p, q=p)
        if self.convolution is not None:
            out_BCHW = self.convolution(out_BCHW)
        return out_BCHW[:, : self.channels]

    def _tokens(self, time_BD: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Time, class and text tokens [B, M, D], and where they are not padding."""
        out = [time_BD[:, None]]
        if self.label is not None:
            out.append(self.label(condition.label_B)[:, None])
        if self.text is None:
            return torch.cat(out, dim=1), None
        assert condition.text is not None, "a denoiser of text needs text, zero for none"
        mask_BM = F.pad(text_mask(condition.text), (len(out), 0), value=True)
        return torch.cat([*out, self.text(condition.text)], dim=1), mask_BM

    def _summary(self, time_BD: Tensor, condition: Condition) -> Tensor:
        """Time, class and the mean of the text's tokens in one vector: [B, D]."""
        out_BD = time_BD
        if self.label is not None:
            out_BD = out_BD + self.label(condition.label_B)
        if self.text is not None:
            assert condition.text is not None, "a denoiser of text needs text, zero for none"
            there_BM1 = text_mask(condition.text)[..., None]
            total_BD = (self.text(condition.text) * there_BM1).sum(1)
            out_BD = out_BD + total_BD / there_BM1.sum(1).clamp(min=1)
        return out_BD

    def _run_blocks(
        self, h_BND: Tensor, modulation_B1D: Tensor | None, padding: Padding | None, rotation: Rotation | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens after the last block, and after those that the inner head and the projector read."""
        read = (self.config.inner_head, self.projector.block if self.projector is not None else 0)
        kept: dict[int, Tensor] = {}
        skips: list[Tensor] = []
        first_BKNE = None  # the first block's values, where the others want them
        for i, block in enumerate(self.blocks):
            skip_BND = skips.pop() if block.skip is not None else None
            arguments = (h_BND, modulation_B1D, skip_BND, padding, first_BKNE, rotation)
            if i < self.checkpointed and torch.is_grad_enabled():
                h_BND, value_BKNE = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BND, value_BKNE = block(*arguments)
            if i == 0 and self.config.value_residual:
                first_BKNE = value_BKNE
            if self.config.long_skips and i < self.config.depth // 2:
                skips.append(h_BND)
            if i + 1 in read:
                kept[i + 1] = h_BND
        return h_BND, kept


def grid_of(patch: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the tokens of a latent; `InputError` if the patch does not divide it."""
    if height % patch or width % patch:
        raise InputError(f"model.patch={patch} does not divide the latent size {height}x{width}")
    return height // patch, width // patch
