"""Whether an image shows what its caption asks for: is the real image nearest to it one that bears this caption?"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from ldt.errors import InputError

NEAREST = 5
CHUNK = 1024


class Retrieval(NamedTuple):
    """The share of images whose nearest real one bears their caption, and that where one of the nearest five does.

    chance, chance_top5: the same for real images drawn blindly.
    """

    top1: float
    top5: float
    chance: float
    chance_top5: float


def caption_retrieval(
    generated_ND: ArrayLike, real_MD: ArrayLike, asked: Sequence[str], borne: Sequence[str]
) -> Retrieval:
    """asked: the caption of each generated image; borne: that of each real one.

    Images that no caption was asked of are left out. Distances are those of the features, in float64.
    """
    generated, real = (torch.as_tensor(np.asarray(x)).double() for x in (generated_ND, real_MD))
    assert (len(generated), len(real)) == (len(asked), len(borne)), "a caption an image"
    held = Counter(borne)
    told = [i for i, caption in enumerate(asked) if caption]
    if not told:
        raise InputError("caption_retrieval needs images that were drawn of captions, and all of these are empty")
    nearest = min(NEAREST, len(real))
    first = among = 0
    for start in range(0, len(told), CHUNK):
        ids = told[start : start + CHUNK]
        place_BK = torch.cdist(generated[ids], real).topk(nearest, largest=False).indices.tolist()
        for i, places in zip(ids, place_BK, strict=True):
            hits = [borne[place] == asked[i] for place in places]
            first, among = first + hits[0], among + any(hits)
    chances = [(_chance(held[asked[i]], len(real), 1), _chance(held[asked[i]], len(real), nearest)) for i in told]
    chance, chance_top5 = (float(x) for x in np.mean(chances, 0))
    return Retrieval(first / len(told), among / len(told), chance, chance_top5)


def _chance(bearers: int, images: int, drawn: int) -> float:
    """That one of so many images, drawn without replacement, is a bearer."""
    return 1 - math.comb(images - bearers, drawn) / math.comb(images, drawn)
