"""`dataset.json` of StyleGAN's, edm2's and REPA's tools: {"labels": [[file, class number], …]}, or null for none."""

import json
from array import array
from collections.abc import Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.data.images.listing import NameList, Names
from ldt.errors import InputError
from ldt.files import MOST_CLASSES, natural

LABELS = "dataset.json"


def labels_in(content: bytes, names: Names, file: str) -> NDArray[np.int32] | None:
    """The class numbers of images, None where the file has no classes; `InputError` for images that it lacks."""
    listed, label_n = listed_labels(content, file)
    if not len(listed):
        return None
    place_n = listed.positions(names)
    if (place_n < 0).any():
        raise InputError(f"{file} has no label for {names[int((place_n < 0).argmax())]}; add it, or remove the image")
    return label_n[place_n]


def listed_labels(content: bytes, file: str) -> tuple[Names, NDArray[np.int32]]:
    """The names that the file lists and their class numbers; none where its labels are null."""
    listed, label_n = NameList(), array("i")
    try:
        for name, label in _pairs(content.decode()):
            if not natural(label) or label >= MOST_CLASSES:
                raise InputError(f"{file} has {label!r} as the label of {name}; labels are class numbers from 0")
            listed.append(name)
            label_n.append(label)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f'{file} is not readable ({error}); it needs {{"labels": [[file, class number], …]}}, or remove it'
        ) from None
    return listed.names(), np.array(label_n, np.int32)


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    """The entries of "labels" one by one: all of them at once would be Python objects for each image."""
    decode, at = json.JSONDecoder().raw_decode, _after(text, 0, "{")
    while text[at] != "}":
        key, at = decode(text, at)
        at = _after(text, at, ":")
        if key == "labels" and text[at] == "[":
            at = _after(text, at, "[")
            while text[at] != "]":
                (name, label), at = decode(text, at)
                yield name, label
                at = _next(text, at, "]")
            at += 1
        else:
            value, at = decode(text, at)
            if key == "labels" and value is not None:
                raise ValueError(f"labels are {type(value).__name__}, not a list")
        at = _next(text, at, "}")


def _after(text: str, at: int, mark: str) -> int:
    """Where the next word begins behind a mark, which has to come next."""
    at = WHITESPACE.match(text, at).end()
    if text[at] != mark:
        raise ValueError(f"{mark!r} is expected at character {at:,}")
    return int(WHITESPACE.match(text, at + 1).end())


def _next(text: str, at: int, end: str) -> int:
    """Where the next item of a list or mapping begins, or where it ends."""
    at = WHITESPACE.match(text, at).end()
    return at if text[at] == end else _after(text, at, ",")
