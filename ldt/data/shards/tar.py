"""The tar format of webdataset: a sample is a run of members `<key>.cls`, `<key>.moments.npy`, ...

With captions also `<key>.txt` and `<key>.text.npy`, with targets `<key>.target.npy`. Keys are the samples' numbers in
the data set. Written by webdataset itself, with mtime 0 so that equal samples give equal bytes; read by strided views
over the headers, which cost a few microseconds a sample instead of a Python loop (with captions, whose lengths differ,
by that loop: `walk`).
"""

import io
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ldt.data.shards.foreign_tar import walk
from ldt.data.shards.layout import FLIPPED, MOMENTS, Index, Layout, Samples, make_index
from ldt.errors import InputError

SUFFIX = ".tar"
CLS, TXT, NPY = "cls", "txt", ".npy"
BLOCK = 512
_USTAR = np.frombuffer(b"ustar", np.uint8)


def pack(samples: Samples, layout: Layout, first: int) -> bytes:
    """One shard file; `first` is the number of its first sample in the data set."""
    import webdataset  # 1.3 s to import, and only writers need it

    out = io.BytesIO()
    with webdataset.TarWriter(out, encoder=False, mtime=0, user="", group="") as writer:
        for i in range(len(samples)):
            sample = {"__key__": f"{first + i:010d}", CLS: b"%d" % samples.label_n[i]}
            if samples.captions is not None:
                sample[TXT] = samples.captions[i]
            sample |= {name + NPY: _npy(array[i]) for name, array in samples.arrays.items()}
            writer.write(sample)
    return out.getvalue()


def index(content: NDArray[np.uint8], layout: Layout, name: str) -> Index:
    """Find the samples in a shard's bytes; anything that does not fit together is an InputError."""
    if layout.captions:  # their lengths differ
        return walk(content, layout, name)
    try:
        return _strided(content, layout, name)
    except InputError:  # another writer's file, or a damaged one: the slow way tells
        return walk(content, layout, name)


def _strided(content: NDArray[np.uint8], layout: Layout, name: str) -> Index:
    """All samples laid out like the first one, as `pack` writes them."""
    wanted = [CLS, *(array + NPY for array in layout.arrays)]
    first = _first_sample(content, wanted, name)
    stride = sum(BLOCK + m.padded for m in first)
    n = _count(content, stride, name)
    if n == 0:
        return make_index(layout, np.empty(0, np.int64), dict.fromkeys(layout.arrays, np.empty(0, np.int64)))
    place = {}
    at = 0
    for member in first:
        header_nk = _view(content, at, n, stride, BLOCK)
        size_n = _check_headers(header_nk, member, name)
        place[member.extension] = at + BLOCK
        if member.extension == CLS:
            label_n = _digits(_view(content, at + BLOCK, n, stride, BLOCK), size_n, name)
        else:
            array = member.extension.removesuffix(NPY)
            _check_arrays(_view(content, at + BLOCK, n, stride, member.padded), size_n, layout, array, name)
        at += BLOCK + member.padded
    _check_keys(content, n, stride, [place[m.extension] - BLOCK for m in first], name)
    start = np.arange(n) * stride
    return make_index(layout, label_n, {a: start + place[a + NPY] + len(_npy_header(layout, a)) for a in layout.arrays})


@dataclass(frozen=True)
class _Member:
    extension: str
    padded: int  # bytes up to the next header


def _first_sample(content: NDArray[np.uint8], wanted: list[str], name: str) -> list[_Member]:
    """The members of the first sample, which every other sample must repeat."""
    members: list[_Member] = []
    at = 0
    for extension in wanted:
        header = bytes(content[at : at + BLOCK])
        if len(header) < BLOCK:
            raise InputError(f"shard {name} is damaged: it ends within its first sample; encode it again")
        found = header[:100].split(b"\0", 1)[0].decode(errors="replace").partition(".")[2]
        digits = header[124:135]
        if header.strip(b"\0") == b"" and not members:
            return [_Member(e, 0) for e in wanted]  # an archive without samples
        if found != extension or not digits.isdigit():
            raise InputError(
                f"shard {name} has a member {found!r} where .{extension} belongs; encode or index it again"
            )
        padded = -(-int(digits, 8) // BLOCK) * BLOCK
        members.append(_Member(extension, padded))
        at += BLOCK + padded
    return members


def _count(content: NDArray[np.uint8], stride: int, name: str) -> int:
    """Samples before the end-of-archive mark of two zero blocks."""
    n = len(content) // stride
    while n > 0 and not content[(n - 1) * stride : (n - 1) * stride + BLOCK].any():
        n -= 1  # zeros up to tar's record size can be longer than a sample
    tail = content[n * stride :]
    if len(tail) < 2 * BLOCK or tail.any():
        raise InputError(f"shard {name} is damaged: the archive does not end where its samples do; encode it again")
    return n


def _view(content: NDArray[np.uint8], at: int, n: int, stride: int, width: int) -> NDArray[np.uint8]:
    """Bytes [at, at + width) of each of n samples, without copying."""
    return np.ndarray((n, width), np.uint8, buffer=content, offset=at, strides=(stride, 1))


def _check_headers(header_nk: NDArray[np.uint8], member: _Member, name: str) -> NDArray[np.int64]:
    """Check every header of one kind of member; returns the payload sizes."""
    size_n = _octal(header_nk[:, 124:135])
    total_n = header_nk.sum(1, dtype=np.int64) - header_nk[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    good = (
        (header_nk[:, 257:262] == _USTAR).all(1)
        & (header_nk[:, 156] == ord("0"))
        & (-(-size_n // BLOCK) * BLOCK == member.padded)
        & (total_n == _octal(header_nk[:, 148:154]))
    )
    if not good.all():
        raise InputError(
            f"shard {name} is damaged: sample {int((~good).argmax())} has a broken header for .{member.extension}; "
            "encode it again"
        )
    return size_n


def _check_keys(content: NDArray[np.uint8], n: int, stride: int, headers: list[int], name: str) -> None:
    """All members of a sample carry one key, and keys do not repeat."""
    width = int((content[headers[0] : headers[0] + 100] == ord(".")).argmax()) + 1
    key_nk = _view(content, headers[0], n, stride, width)
    for header in headers[1:]:
        if (_view(content, header, n, stride, width) != key_nk).any():
            raise InputError(f"shard {name} is damaged: members of different samples are mixed; encode it again")
    if len(np.unique(np.ascontiguousarray(key_nk).view(f"S{width}"))) != n:
        raise InputError(f"shard {name} is damaged: a sample is in it twice; encode it again")


def _check_arrays(
    payload_nk: NDArray[np.uint8], size_n: NDArray[np.int64], layout: Layout, array: str, name: str
) -> None:
    expected, (dtype, shape) = np.frombuffer(_npy_header(layout, array), np.uint8), layout.arrays[array]
    size = len(expected) + prod(shape) * dtype.itemsize
    same = (payload_nk[:, : len(expected)] == expected).all(1) & (size_n == size)
    if not same.all():
        named = f"{layout.dtype}" if array in (MOMENTS, FLIPPED) else dtype.name
        raise InputError(
            f"shard {name}: the array {array} of sample {int((~same).argmax())} is not {named} of shape {shape} as its "
            "manifest says; encode it again"
        )


def _octal(digits_nk: NDArray[np.uint8]) -> NDArray[np.int64]:
    weight = 8 ** np.arange(digits_nk.shape[1] - 1, -1, -1)
    return (digits_nk.astype(np.int64) - ord("0")) @ weight


def _digits(payload_nk: NDArray[np.uint8], size_n: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    """Decimal text of 1 to 18 digits as integers."""
    label_n = np.zeros(len(size_n), np.int64)
    if size_n.min() < 1 or size_n.max() > 18:
        raise InputError(f"shard {name} is damaged: a label is not a number; encode it again")
    for k in range(int(size_n.max())):
        here = size_n > k
        digit = payload_nk[here, k].astype(np.int64) - ord("0")
        if ((digit < 0) | (digit > 9)).any():
            raise InputError(f"shard {name} is damaged: a label is not a number; encode it again")
        label_n[here] = label_n[here] * 10 + digit
    return label_n


def _npy(array: NDArray[np.generic]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _npy_header(layout: Layout, array: str) -> bytes:
    out, (dtype, shape) = io.BytesIO(), layout.arrays[array]
    np.lib.format.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return out.getvalue()
