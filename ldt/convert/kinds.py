"""Which project a file of weights is of, and its converter."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ldt.convert.dit import from_dit, from_repa, from_sit
from ldt.convert.lightningdit import from_lightningdit
from ldt.convert.uvit import from_uvit
from ldt.convert.weights import Converted
from ldt.errors import InputError

CONVERTERS: dict[str, Callable[[dict[str, Tensor], int], Converted]] = {
    "dit": from_dit,
    "sit": from_sit,
    "repa": from_repa,
    "lightningdit": from_lightningdit,
    "uvit": from_uvit,
}
TRACES = {
    "uvit": ("in_blocks.", "mid_block.", "decoder_pred."),
    "repa": ("projectors.",),
    "lightningdit": ("feat_rope.", "blocks.0.mlp.w12.", "blocks.0.norm1."),
}
"""Names that only one kind has."""


def kind_of(theirs: dict[str, Tensor], file: Path) -> str:
    """The kind by the names in the file; DiT's and SiT's are the same, and there the file's own name has to say it."""
    for kind, traces in TRACES.items():
        if any(name.startswith(traces) for name in theirs):
            return kind
    if "x_embedder.proj.weight" not in theirs:
        some = ", ".join(list(theirs)[:3])
        raise InputError(
            f"weights={file} are of none of these: {', '.join(CONVERTERS)}; their names are {some}, … and there is "
            "neither x_embedder.proj.weight nor patch_embed.proj.weight among them"
        )
    kinds = ("lightningdit", "repa", "sit", "dit")
    named = [kind for kind in kinds if re.search(rf"(?<![a-z]){kind}(?![a-z])", file.name.lower())]
    if not named:
        raise InputError(
            f"weights={file} may be DiT's or SiT's, whose files have the same names and other meanings; say kind=dit, "
            "kind=sit or kind=repa"
        )
    return named[0]
