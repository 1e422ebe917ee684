"""What a step moves through a GPU's memory besides its matrix products: elementwise operations and the optimizer.

Counted in bytes, from a forward and a backward pass of tensors without content, operation by operation as eager code
runs them. Divided by what the memory can do, it is the part of a step that no faster matrix product shortens.
"""

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.diffusion.condition import Condition
from ldt.engine import memory
from ldt.engine.config import at_work
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.nn.text_shape import TextShape

FUSED = 0.63
"""What compiled code moves of that; counted for adaLN-Zero blocks by hand (64 of 101 passes over the tokens)."""

ELSEWHERE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "unsafe_view", "empty", "new_empty")
"""Products, whose time is that of their operations, and what moves nothing."""


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """Bytes for one sample that operations between the products read and write, by eager code."""

    forward: int
    backward: int

    def of(self, again: float, compiled: bool) -> float:
        """Bytes in a step; again: which part of the forward pass is computed a second time."""
        return ((1 + again) * self.forward + self.backward) * (FUSED if compiled else 1)


class _Bytes(TorchDispatchMode):
    """Sums what operations read and write; views move nothing, products are not bound by memory."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("aten::") and not func.is_view and not name[6:].lstrip("_").startswith(ELSEWHERE):
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return out


def elementwise(
    config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, text: TextShape | None, precision: str
) -> Elementwise:
    """Elementwise bytes of a denoiser in training; a deep Transformer's follow from two shallow ones."""

    def counted(depth: int) -> tuple[int, int]:
        shallow = dataclasses.replace(config, depth=depth, init="dit", inner_head=min(config.inner_head, 1))
        one, two = (_moved(shallow, latent_shape, classes, text, precision, samples) for samples in (1, 2))
        return two[0] - one[0], two[1] - one[1]  # without what does not grow with the batch

    first = 2 + config.depth % 2
    if config.name != "transformer" or config.depth <= first + 2:
        return Elementwise(*counted(config.depth))
    low, high = counted(first), counted(first + 2)
    pairs = (config.depth - first) // 2
    return Elementwise(*(a + pairs * (b - a) for a, b in zip(low, high, strict=True)))


def _moved(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    text: TextShape | None,
    precision: str,
    samples: int,
) -> tuple[int, int]:
    """Bytes in a forward and in a backward pass."""
    with FakeTensorMode():
        model = memory.training_model(build(config, latent_shape, classes, seed=0, text=text), precision, "cuda")
        x_BCHW, t_B = torch.zeros(samples, *latent_shape), torch.zeros(samples)
        label_B = torch.zeros(samples, dtype=torch.int64)
        words = memory.no_text(text, samples) if config.uses_text else None
        with _Bytes() as forward:
            inputs = (x_BCHW, t_B, Condition(label_B, words))
            outputs = model(*inputs, inner=True) if config.inner_head else (model(*inputs),)
            loss = sum((y.square().mean() for y in outputs), torch.zeros(()))
        with _Bytes() as backward:
            loss.backward()
    return forward.total, backward.total


def optimizer_bytes(
    parameters: int, stage: int, precision: str, ranks: int, averages: int, micro_batches: int = 1
) -> int:
    """What a rank moves between the backward pass and the next forward pass.

    Gradients: read for their norm, and copied by DeepSpeed 0.19 into flat buffers, in float32 where they are summed in
    it; its own stage 1 in bf16 also keeps, adds and zeroes them in it for all weights. Adam reads and writes
    master and moments (28 bytes), writes the weights; an average takes 12. Clipping is inside of Adam's kernel. All but
    the first are a rank's share.
    """
    width = 2 if precision == "bf16" else 4
    own = 4 + 28 + 12 * averages + 4 + width  # norm, Adam, averages, master to weights
    stage, summed = at_work(stage, precision, ranks, micro_batches)
    if stage == 0:
        return (4 + 28 + 8) * parameters + 12 * averages * parameters // ranks
    if (precision, stage) == ("bf16", 1):
        return (18 + 8 + 4 + 8) * parameters + own * parameters // ranks
    widened = width + summed if summed > width else 0
    return (4 * width + widened) * parameters + (own + 8) * parameters // ranks
