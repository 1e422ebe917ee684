"""A tar of any writer, member by member: slower than the strided view of `tar`, and stricter.

Shards of other writers differ in the order of members, in padding of sizes or in PAX headers. Nothing is extracted, no
payload is unpickled; what doesn't fit together is an InputError that names the shard and the member.
"""

import io
import tarfile

import numpy as np
from numpy.typing import NDArray

from ldt.data.shards.layout import FLIPPED, MOMENTS, STORED, Index, Layout
from ldt.errors import InputError

CLS, NPY = "cls", ".npy"
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
END = bytes(1024)


def walk(content: NDArray[np.uint8], layout: Layout, name: str) -> Index:
    """Like `tar.index`, for any well-formed tar of samples `<key>.cls`, `<key>.moments.npy`, ..."""
    wanted = [CLS, MOMENTS + NPY] + ([FLIPPED + NPY] if layout.flips else [])
    samples = _members(content, name)
    label, places = [], []
    for key, members in samples.items():
        for extension in wanted:
            if extension not in members:
                raise InputError(f"shard {name}: sample {key} has no .{extension}; write it again with all its parts")
        start, size = members[CLS]
        text = content[start : start + size].tobytes()
        if not text.strip().isdigit() or len(text) > 18:
            raise InputError(f"shard {name}: the label of sample {key} is {text[:20]!r}, not a whole number")
        label.append(int(text))
        places.append([_array(content, *members[e], layout, f"shard {name}: {key}.{e}") for e in wanted[1:]])
    place = np.array(places, np.int64).reshape(len(places), len(wanted) - 1)
    return Index(np.array(label, np.int64), place[:, 0].copy(), place[:, 1].copy() if layout.flips else None)


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
    dtype, shape, _ = _header(content, *members[MOMENTS + NPY], f"shard {name}: {key}.{MOMENTS}{NPY}")
    known = {stored: d for d, stored in STORED.items()}
    if dtype not in known or len(shape) != 4 or shape[0] != 2:
        raise InputError(f"shard {name}: moments are {dtype} {shape}; [2, C, H, W] of {', '.join(STORED)} is expected")
    return Layout(shape[1:], known[dtype], FLIPPED + NPY in members)


def _members(content: NDArray[np.uint8], name: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of each member by key and extension, in the order of keys in the file."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content.data), mode="r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"shard {name} is damaged: {error or type(error).__name__}; write it again") from None
    for member in members:
        parts = member.name.split("/")
        if member.name.startswith("/") or ".." in parts:
            raise InputError(f"shard {name} has a member {member.name!r} outside of its directory; write it again")
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
    stream = io.BytesIO(content[start : start + min(size, 4096)].tobytes())
    try:
        major = np.lib.format.read_magic(stream)[0]
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, SyntaxError, TypeError) as error:
        raise InputError(f"{what} is not a readable .npy array ({error}); write it again") from None
    if fortran or dtype.hasobject:
        raise InputError(f"{what} is in Fortran order or holds objects; write it in C order")
    return dtype, shape, stream.tell()


def _array(content: NDArray[np.uint8], start: int, size: int, layout: Layout, what: str) -> int:
    """Where the array's data begin."""
    dtype, shape, header = _header(content, start, size, what)
    if dtype != STORED[layout.dtype] or shape != layout.moments_shape or size != header + layout.moments_bytes:
        raise InputError(f"{what} is {dtype} {shape}, not {layout.dtype} {layout.moments_shape} like the first sample")
    return start + header
