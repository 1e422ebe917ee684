"""A tar of any writer, member by member: slower than the strided view of `tar`, and stricter.

Shards of other writers differ in the order of members, in padding of sizes or in PAX headers. Nothing is extracted, no
payload is unpickled; what doesn't fit together is an InputError that names the shard and the member.
"""

import functools
import io
import tarfile
import threading
import tokenize
from math import prod

import numpy as np
from numpy.typing import NDArray

from ldt.data.shards.layout import FLIPPED, MOMENTS, STORED, TEXT, Index, Layout, make_index, refuse_targets
from ldt.errors import InputError
from ldt.files import npy_header
from ldt.nn.text_shape import TextShape

CLS, TXT, NPY = "cls", "txt", ".npy"
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
END = bytes(1024)


def walk(content: NDArray[np.uint8], layout: Layout, name: str) -> Index:
    """Like `tar.index`, for any well-formed tar of samples `<key>.cls`, `<key>.moments.npy`, ..."""
    wanted = [CLS, *(array + NPY for array in layout.arrays)] + ([TXT] if layout.captions else [])
    samples = _members(content, name)
    label, captions = [], []
    places: dict[str, list[int]] = {array: [] for array in layout.arrays}
    for key, members in samples.items():
        for extension in wanted:
            if extension not in members:
                raise InputError(f"shard {name}: sample {key} has no .{extension}; write it again with all its parts")
        start, size = members[CLS]
        text = content[start : start + size].tobytes()
        if not text.strip().isdigit() or len(text) > 18:
            raise InputError(f"shard {name}: the label of sample {key} is {text[:20]!r}, not a whole number")
        label.append(int(text))
        for array in layout.arrays:
            what = f"shard {name}: {key}.{array}{NPY}"
            places[array].append(_array(content, *members[array + NPY], layout, array, what))
        if layout.captions:
            captions.append(_caption(content, *members[TXT], f"shard {name}: {key}.{TXT}"))
    return make_index(
        layout,
        np.array(label, np.int64),
        {array: np.array(place, np.int64) for array, place in places.items()},
        np.array(captions, np.int64).reshape(-1, 2) if layout.captions else None,
    )


def find_layout(content: NDArray[np.uint8], name: str) -> Layout:
    """The layout of a shard's first sample."""
    samples = _members(content, name)
    if not samples:
        raise InputError(f"shard {name} holds no samples; remove it")
    key, members = next(iter(samples.items()))
    if MOMENTS + NPY not in members:
        raise InputError(
            f"shard {name}: sample {key} has no .{MOMENTS}{NPY} (float array [2, C, H, W]), but {[*members]}"
        )
    refuse_targets([member.removesuffix(NPY) for member in members], name)
    dtype, shape, _ = _header(content, *members[MOMENTS + NPY], f"shard {name}: {key}.{MOMENTS}{NPY}")
    known = {stored: d for d, stored in STORED.items()}
    if dtype not in known or len(shape) != 4 or shape[0] not in (1, 2):
        raise InputError(
            f"shard {name}: moments are {dtype} {shape}; [2, C, H, W] of {', '.join(STORED)} is expected, or [1, C, H, "
            "W] of an autoencoder without a posterior"
        )
    words = _text_shape(content, members, name)
    return Layout(shape[1:], known[dtype], FLIPPED + NPY in members, TXT in members, words, shape[0] == 2)


def _text_shape(content: NDArray[np.uint8], members: dict[str, tuple[int, int]], name: str) -> TextShape | None:
    """The shape of stored tokens or features, from the first sample. Token numbers may be as large as uint16 allows."""
    if TEXT + NPY not in members:
        return None
    dtype, shape, _ = _header(content, *members[TEXT + NPY], f"shard {name}: .{TEXT}{NPY}")
    if dtype == np.dtype("<u2") and len(shape) == 1:
        return TextShape(shape[0], vocabulary=1 << 16)
    if dtype == np.dtype("<f2") and len(shape) == 2:
        return TextShape(shape[0], width=shape[1])
    raise InputError(f"shard {name}: .{TEXT}{NPY} is {dtype} {shape}; expected is uint16 [M] or float16 [M, F]")


def _caption(content: NDArray[np.uint8], start: int, size: int, what: str) -> tuple[int, int]:
    """Offset and size of a caption."""
    try:
        content[start : start + size].tobytes().decode()
    except UnicodeDecodeError:
        raise InputError(f"{what} is not UTF-8; write it again") from None
    return start, size


def _members(content: NDArray[np.uint8], name: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of each member by key and extension, in the order of keys in the file."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content.data), mode="r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"shard {name} is damaged: {error or type(error).__name__}; write it again") from None
    for member in members:
        parts = [part for part in member.name.split("/") if part != "."]
        if member.name.startswith("/") or ".." in parts:
            raise InputError(f"shard {name} has a member {member.name!r} outside of its directory; write it again")
        if member.isdir():  # `tar -C directory .` writes them too
            continue
        if not member.isfile():
            raise InputError(f"shard {name} has a member {member.name!r} that is not a plain file; write it again")
        stem, _, extension = parts[-1].partition(".")
        key = "/".join([*parts[:-1], stem])
        if extension.split(".")[-1] in PICKLES:
            raise InputError(f"shard {name} has a pickle {member.name!r}, which is never read; write arrays as .npy")
        known = samples.setdefault(key, {})
        if extension in known:
            raise InputError(f"shard {name} has {member.name!r} twice; write it again")
        if member.offset_data + member.size > len(content):
            raise InputError(f"shard {name} is damaged: it ends within {member.name!r}; write it again")
        known[extension] = (member.offset_data, member.size)
    end = max((-(-(m.offset_data + m.size) // 512) * 512 for m in members), default=0)
    tail = content[end:]  # tarfile itself ends without a word at the first broken header
    if len(tail) < len(END) or tail.any():
        raise InputError(f"shard {name} is damaged: the archive has no end after its last member; write it again")
    return samples


def _header(content: NDArray[np.uint8], start: int, size: int, what: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and length of an .npy header."""
    prefix = content[start : start + min(size, 12)].tobytes()
    length = 10 + int.from_bytes(prefix[8:10], "little") if prefix[6:7] == b"\1" else 4096
    with _PARSING:
        try:
            return _parsed(content[start : start + min(size, length)].tobytes())
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
            raise InputError(f"{what} is not a readable .npy array ({error}); write it again") from None
        except _Unfit:
            raise InputError(f"{what} is in Fortran order or holds objects; write it in C order") from None


_PARSING = threading.Lock()  # numpy parses headers with `ast`, which in Python 3.11 fails in two threads at once


class _Unfit(Exception):
    """An array whose bytes can't be used as they lie there."""


@functools.lru_cache(maxsize=1024)
def _parsed(header: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Parse a header. Samples of a shard share theirs, so results are kept: parsing takes longer than all the rest."""
    shape, fortran, dtype, size = npy_header(header)
    if fortran or dtype.hasobject:
        raise _Unfit
    return dtype, shape, size


def _array(content: NDArray[np.uint8], start: int, size: int, layout: Layout, array: str, what: str) -> int:
    """Where the array's data begin."""
    dtype, shape, header = _header(content, start, size, what)
    expected, expected_shape = layout.arrays[array]
    named = layout.dtype if array in (MOMENTS, FLIPPED) else expected.name
    if dtype != expected or shape != expected_shape or size != header + prod(expected_shape) * expected.itemsize:
        raise InputError(f"{what} is {dtype} {shape}, not {named} {expected_shape} like the first sample")
    return start + header
