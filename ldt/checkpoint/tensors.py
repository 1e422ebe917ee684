"""Tensors of a checkpoint: one-dimensional float32 slices of flattened parameters in safetensors files.

The manifest says which elements each file holds, so resharding is only a matter of reading the right slices.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldt.checkpoint.manifest import Damaged, absent_of
from ldt.files import write_synced
from ldt.nn.align import PREFIX


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write contiguous float32 CPU tensors in the safetensors format, synced; returns {"bytes", "xxh64"} of the file.

    Unlike the library's writer it hashes what it writes, takes views without copying them, and syncs.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32, (key, tensor.dtype)
        size = 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    parts: list[bytes | memoryview] = [len(head).to_bytes(8, "little"), head, *map(_bytes, tensors.values())]
    digest = xxhash.xxh64()
    for part in parts:
        digest.update(part)
    write_synced(path, *parts)
    return {"bytes": 8 + len(head) + offset, "xxh64": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    array: np.ndarray = tensor.detach().contiguous().numpy()
    return array.reshape(-1).data.cast("B") if array.size else memoryview(b"")


class Reader:
    """Slices of a checkpoint's tensors, wherever they are."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.manifest, self.files = manifest, []
        for name, entry in manifest["files"].items():
            try:
                self.files.append((entry["ranges"], safe_open(path / name, framework="pt")))
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{path / name} is not readable as safetensors ({error})") from None

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of flattened `kind/name`: float32, 1-D."""
        if name in absent_of(self.manifest).get(kind, ()):
            return torch.zeros(count)
        out = torch.empty(count, dtype=torch.float32)
        filled = 0
        for ranges, file in self.files:
            if name not in ranges:
                continue
            low, high = ranges[name][0], sum(ranges[name])
            a, b = max(low, start), min(high, start + count)
            if a < b:
                out[a - start : b - start] = _piece(file, f"{kind}/{name}", high - low)[a - low : b - low]
                filled += b - a
        if filled != count:
            raise Damaged(f"{kind}/{name} has {filled} of the elements {start} to {start + count}")
        return out

    def full(self, kind: str) -> dict[str, Tensor]:
        """All parameters of the denoiser in their shapes: the projector of an alignment is training's alone."""
        shapes = {k: s for k, s in self.manifest["parameters"].items() if not k.startswith(PREFIX)}
        return {k: self.read(kind, k, 0, math.prod(s)).view(s) for k, s in shapes.items()}


def _piece(file: Any, key: str, count: int) -> Any:
    """A tensor of a file, not yet read; `Damaged` if it isn't `count` numbers in float32."""
    try:
        piece = file.get_slice(key)
    except SafetensorError as error:
        raise Damaged(f"a file does not hold what the manifest says ({error})") from None
    if piece.get_dtype() != "F32" or piece.get_shape() != [count]:
        raise Damaged(f"{key} is {piece.get_dtype()} {piece.get_shape()}, not {count} numbers in float32")
    return piece
