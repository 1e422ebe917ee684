"""Features of images on disk, one file a block of consecutive ids, while a score is being made.

Blocks are written whole or not at all, by whichever process made them, so a job that was killed continues with the
missing blocks; they are read back in the order of ids, so the result does not depend on who made what. Several jobs may
do the same work at once: the first one that has its result removes the blocks.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ldt.errors import RunError
from ldt.files import replacing

Arrays = dict[str, NDArray[np.float32]]


class Vanished(RunError):
    """The blocks are gone: another job that did the same work has its result."""


class FeatureStore:
    """`block-<k>.safetensors` files in a directory; each holds float32 arrays with a row an image."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _file(self, k: int) -> Path:
        return self.directory / f"block-{k:07d}.safetensors"

    def has(self, k: int) -> bool:
        """Whether block k is there and readable; a damaged one is removed."""
        file = self._file(k)
        if not file.exists():
            return False
        try:
            load_file(file)
        except (SafetensorError, OSError):
            file.unlink(missing_ok=True)
            return False
        return True

    def write(self, k: int, arrays: Arrays) -> None:
        """Write block k atomically."""
        self.directory.mkdir(parents=True, exist_ok=True)  # another job at the same work may have ended meanwhile
        with replacing(self._file(k)) as temporary:
            temporary.write_bytes(save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))

    def read(self, blocks: int) -> Iterator[Arrays]:
        """Read blocks 0 to blocks − 1 in order; `Vanished` if one is missing."""
        for k in range(blocks):
            try:
                yield load_file(self._file(k))
            except FileNotFoundError:
                raise Vanished(
                    f"{self.directory} was removed meanwhile, perhaps by a job that did the same; run the command again"
                ) from None

    def column(self, name: str, blocks: int) -> NDArray[np.float32]:
        """One array of all blocks, in the order of ids."""
        return np.concatenate([arrays[name] for arrays in self.read(blocks)])

    def remove(self) -> None:
        """Delete the directory, once the score is computed."""
        shutil.rmtree(self.directory, ignore_errors=True)  # another job may be at it too


class FeatureSet(Protocol):
    """Features of a set of images, in the order of their ids."""

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """One kind of feature, piece by piece."""
        ...

    def column(self, name: str) -> NDArray[np.float32]:
        """One kind of feature of all images."""
        ...


class StoredFeatures:
    """Those of all blocks of a store."""

    def __init__(self, store: FeatureStore, blocks: int) -> None:
        self._store, self._blocks = store, blocks

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return (arrays[name] for arrays in self._store.read(self._blocks))

    def column(self, name: str) -> NDArray[np.float32]:
        return self._store.column(name, self._blocks)


class ChosenFeatures:
    """Those of some images of a set, by their ids."""

    def __init__(self, column: Arrays, ids: NDArray[np.int64]) -> None:
        self._column, self._ids = column, ids

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        yield self.column(name)

    def column(self, name: str) -> NDArray[np.float32]:
        return self._column[name][self._ids]
