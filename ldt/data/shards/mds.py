"""The MDS format of mosaicml-streaming, version 2, without needing that package.

File: sample count n (uint32), n + 1 offsets (uint32), a JSON description of the columns, the samples. A sample is the
sizes (uint32) of its columns of variable size, then the columns in alphabetical order. Of ours only the caption has a
variable size, and it comes first.
"""

import json
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.data.shards.layout import (
    CAPTION,
    FLIPPED,
    LABEL,
    MOMENTS,
    STORED,
    TEXT,
    Index,
    Layout,
    Samples,
    make_index,
    refuse_targets,
)
from ldt.errors import InputError
from ldt.nn.text_shape import TextShape

SUFFIX = ".mds"
SIZE_LIMIT = 1 << 26  # written into each shard's description by MDSWriter; has no effect on reading
LARGEST = 2**32 - 1  # offsets are 32 bits wide


def pack(samples: Samples, layout: Layout, first: int) -> bytes:
    """One shard file, the same bytes as MDSWriter's. `first` (the first sample's number) is not stored in MDS."""
    parts = [samples.label_n.astype("<i8")[:, None].view(np.uint8), *map(_rows, samples.arrays.values())]
    fixed = np.concatenate(parts, axis=1)
    captions = samples.captions
    records = [row.tobytes() for row in fixed]
    if captions is not None:
        records = [np.uint32(len(c)).tobytes() + c + row for c, row in zip(captions, records, strict=True)]
    sizes = [0, *map(len, records)]
    description = json.dumps(_description(layout), sort_keys=True).encode()
    start = 4 + 4 * (len(samples) + 1) + len(description)
    offsets = start + np.cumsum(sizes, dtype=np.int64)
    if offsets[-1] > LARGEST:
        raise InputError(f"an MDS shard of {offsets[-1]:,} bytes exceeds the format's 4 GB; lower shard_samples")
    head = np.array([len(samples)], "<u4").tobytes() + offsets.astype("<u4").tobytes() + description
    return head + b"".join(records)


def index(content: NDArray[np.uint8], layout: Layout, name: str) -> Index:
    """Find the samples in a shard's bytes; anything that does not fit together is an InputError."""
    if len(content) < 8:
        raise InputError(f"shard {name} is damaged: {len(content)} bytes are no MDS file; encode it again")
    n = int(content[:4].view("<u4")[0])
    if len(content) < 8 + 4 * n:
        raise InputError(f"shard {name} is damaged: it ends within its offsets; encode it again")
    offset = content[4 : 8 + 4 * n].view("<u4").astype(np.int64)
    if offset[0] < 8 + 4 * n or offset[-1] != len(content) or (np.diff(offset) < 0).any():
        raise InputError(f"shard {name} is damaged: its offsets do not fit its {len(content):,} bytes; encode it again")
    columns = _read_columns(bytes(content[8 + 4 * n : offset[0]]), name)
    expected = dict(_columns(layout))
    if columns != [(k, expected[k], _size(k, layout)) for k in expected]:
        named = {column: encoding for column, encoding, _ in columns}
        wrong = [f"{k} ({named[k]})" for k in named if named[k] != expected.get(k)]
        wrong += [f"no {k} ({expected[k]})" for k in expected if k not in named]
        raise InputError(
            f"shard {name} has columns other than {', '.join(expected)}: {', '.join(wrong) or 'in another order'}; "
            "write it again with these alone, all shards alike"
        )
    first = offset[:-1]
    caption_n2 = None
    if layout.captions:
        if (np.diff(offset) < 4).any():
            raise InputError(f"shard {name} is damaged: a sample ends within its sizes; encode it again")
        size_n = content[first[:, None] + np.arange(4)].view("<u4")[:, 0].astype(np.int64)
        caption_n2 = np.stack([first + 4, size_n], axis=1)
        first = first + 4 + size_n
    place, end = {}, 0
    for column, _, size in columns:
        if size is not None:
            place[column], end = end, end + size
    if (offset[1:] - first != end).any():
        raise InputError(f"shard {name} is damaged: its samples are not of {end} bytes each; encode it again")
    label_n = content[first[:, None] + (place[LABEL] + np.arange(8))].view("<i8")[:, 0].astype(np.int64)
    return make_index(layout, label_n, {array: first + place[array] for array in layout.arrays}, caption_n2)


def find_layout(content: NDArray[np.uint8], name: str) -> Layout:
    """The layout, from the shard's own description of its columns."""
    n = int(content[:4].view("<u4")[0]) if len(content) >= 8 else 0
    if len(content) < 8 + 4 * n or n == 0:
        raise InputError(f"shard {name} is damaged or without samples; remove it")
    columns = _read_columns(bytes(content[8 + 4 * n : int(content[4:8].view("<u4")[0])]), name)
    encodings = {k: str(encoding) for k, encoding, _ in columns}
    refuse_targets(encodings, name)
    kind, _, rest = encodings.get(MOMENTS, "").partition(":")
    dtype, _, text = rest.partition(":")
    shape = [int(v) for v in text.split(",") if v.isdigit()]
    known = {stored.name: d for d, stored in STORED.items()}
    if kind != "ndarray" or dtype not in known or len(shape) != 4 or shape[0] not in (1, 2):
        raise InputError(
            f"shard {name} has columns {encodings}; expected are label: int and moments: ndarray:float16:2,C,H,W "
            "(or float32, or uint16 for bf16; 1,C,H,W without a posterior)"
        )
    words = _text_shape(encodings.get(TEXT, ""), name)
    latent_shape = (shape[1], shape[2], shape[3])
    return Layout(latent_shape, known[dtype], FLIPPED in encodings, CAPTION in encodings, words, shape[0] == 2)


def _text_shape(encoding: str, name: str) -> TextShape | None:
    """The shape of stored tokens or features. Token numbers may be as large as uint16 allows."""
    kind, _, shape = encoding.removeprefix("ndarray:").partition(":")
    sizes = [int(v) for v in shape.split(",") if v.isdigit()]
    if not encoding:
        return None
    if kind == "uint16" and len(sizes) == 1:
        return TextShape(sizes[0], vocabulary=1 << 16)
    if kind == "float16" and len(sizes) == 2:
        return TextShape(sizes[0], width=sizes[1])
    raise InputError(f"shard {name} has text as {encoding}; expected is ndarray:uint16:M or ndarray:float16:M,F")


def library_index(names: list[str], sizes: list[int], samples: list[int], hashes: list[str], layout: Layout) -> bytes:
    """The `index.json` with which StreamingDataset opens a directory of shards."""
    shards = [
        _description(layout)
        | {"raw_data": {"basename": name, "bytes": size, "hashes": {"xxh64": value}}, "samples": n, "zip_data": None}
        for name, size, n, value in zip(names, sizes, samples, hashes, strict=True)
    ]
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()


def _rows(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def _columns(layout: Layout) -> list[tuple[str, str]]:
    columns = [(CAPTION, "str")] if layout.captions else []
    arrays = {n: f"ndarray:{dtype.name}:{','.join(map(str, shape))}" for n, (dtype, shape) in layout.arrays.items()}
    return [*columns, (LABEL, "int"), *arrays.items()]


def _size(column: str, layout: Layout) -> int | None:
    """Bytes of a column, None where they vary."""
    if column == CAPTION:
        return None
    if column == LABEL:
        return 8
    dtype, shape = layout.arrays[column]
    return prod(shape) * dtype.itemsize


def _description(layout: Layout) -> dict[str, Any]:
    columns = _columns(layout)
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["xxh64"],
        "size_limit": SIZE_LIMIT,
        "column_names": [k for k, _ in columns],
        "column_encodings": [encoding for _, encoding in columns],
        "column_sizes": [_size(k, layout) for k, _ in columns],
    }


def _read_columns(text: bytes, name: str) -> list[tuple[str, str, int | None]]:
    try:
        d = json.loads(text)
        return list(zip(d["column_names"], d["column_encodings"], d["column_sizes"], strict=True))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"shard {name} is damaged: its column description is unreadable; encode it again") from None
