"""The shape of text, as data hold it and denoisers get it."""

from typing import NamedTuple


class TextShape(NamedTuple):
    """Text as a denoiser gets it: `length` positions a caption, each a token number below `vocabulary` or, where that
    is 0, a vector of `width` features."""

    length: int
    width: int = 0
    vocabulary: int = 0
