"""Reading samples out of latent shards by (shard, sample), in any order, from several threads at once."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from ldt.data.shards import mds, tar
from ldt.data.shards.layout import TARGET_DTYPE, Index, Layout
from ldt.data.shards.manifest import Manifest
from ldt.data.shards.remote import Cache, Remote
from ldt.errors import InputError, RunError, file_error
from ldt.paths import is_remote

T = TypeVar("T")

INDEX: dict[str, Callable[[NDArray[np.uint8], Layout, str], Index]] = {"tar": tar.index, "mds": mds.index}
INDEXES_KEPT = 4096  # at 4096 samples each 64 KB or so
FILES_KEPT = 256


@dataclass(frozen=True)
class Records:
    """Samples as float32. moments_n2CHW: raw posterior mean and, if there is one, standard deviation; label_n: int64.

    text_n: token numbers uint16 [n, M], features float16 [n, M, F], or None; target_n: float16 [n, D, G, G], or None.
    """

    moments_n2CHW: NDArray[np.float32]
    label_n: NDArray[np.int64]
    text_n: NDArray[np.generic] | None = None
    target_n: NDArray[np.float16] | None = None

    @property
    def mean_nCHW(self) -> NDArray[np.float32]:
        return self.moments_n2CHW[:, 0]

    @property
    def std_nCHW(self) -> NDArray[np.float32]:
        return self.moments_n2CHW[:, 1]


class _File:
    """An open descriptor that closes when its last reader lets go."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)

    @property
    def identity(self) -> tuple[int, int, int]:
        stat = os.fstat(self.fd)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


class LatentShards:
    """The shards of one directory.

    A shard's size, hash and structure are checked against the manifest when it is first opened; damage is an
    InputError that names the shard, and nothing of it is ever returned.
    """

    def __init__(self, path: str | Path, manifest: Manifest, cache: Cache | None = None) -> None:
        self.path, self.manifest, self.cache = path, manifest, cache
        self._index: OrderedDict[int, tuple[Index, tuple[int, int, int]]] = OrderedDict()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in range(64)]  # striped: one shard is checked once, others meanwhile

    def read(
        self,
        shard_n: ArrayLike,
        sample_n: ArrayLike,
        flip_n: ArrayLike | None = None,
        text: bool = False,
        target: bool = False,
    ) -> Records:
        """The samples in the order asked. flip_n: bool, take the mirrored image's moments (stored with `flips`).

        text: read what the encoder made of the captions too; target: the features of patches, mirrored as the moments.
        """
        shard_n, sample_n = np.asarray(shard_n, np.int64), np.asarray(sample_n, np.int64)
        layout = self.manifest.layout
        assert flip_n is None or layout.flips, "no mirrored moments stored"
        raw_nb = np.empty((len(shard_n), layout.moments_bytes), np.uint8)
        label_n = np.empty(len(shard_n), np.int64)
        text_n = np.empty((len(shard_n), layout.text_bytes), np.uint8) if text and layout.text else None
        target_n = np.empty((len(shard_n), layout.target_bytes), np.uint8) if target and layout.target else None
        for shard in np.unique(shard_n).tolist():
            here = np.flatnonzero(shard_n == shard)
            file, index = self._open(shard)
            label_n[here] = index.label_n[sample_n[here]]
            offset = index.moments_n[sample_n[here]]
            flip = None if flip_n is None else np.asarray(flip_n)[here]
            if flip is not None and index.flipped_n is not None:
                offset = np.where(flip, index.flipped_n[sample_n[here]], offset)
            self._fill(shard, file, offset, raw_nb, here)
            if target_n is not None and index.target_n is not None:
                offset = index.target_n[sample_n[here]]
                if flip is not None and index.target_flipped_n is not None:
                    offset = np.where(flip, index.target_flipped_n[sample_n[here]], offset)
                self._fill(shard, file, offset, target_n, here)
            if text_n is not None and index.text_n is not None:
                self._fill(shard, file, index.text_n[sample_n[here]], text_n, here)
        words = None if text_n is None else text_n.view(layout.text_dtype).reshape(-1, *layout.text_shape)
        features = None
        if target_n is not None and layout.target:
            features = target_n.view(TARGET_DTYPE).reshape(-1, *layout.target)
        return Records(layout.unpack(raw_nb), label_n, words, features)

    def captions(self, shard: int, sample_n: ArrayLike) -> list[str]:
        """Captions of samples of one shard; empty where the data have none."""
        file, index = self._open(shard)
        if index.caption_n2 is None:
            return [""] * len(np.asarray(sample_n))
        return [os.pread(file.fd, size, at).decode() for at, size in index.caption_n2[np.asarray(sample_n)].tolist()]

    def _fill(
        self, shard: int, file: _File, offset_n: NDArray[np.int64], out_nb: NDArray[np.uint8], rows: NDArray[np.int64]
    ) -> None:
        """Read equally long pieces of a shard into rows of `out_nb`."""
        size, out = out_nb.shape[1], out_nb.reshape(-1).data
        for row, at in zip(rows.tolist(), offset_n.tolist(), strict=True):
            if os.preadv(file.fd, [out[row * size : (row + 1) * size]], at) != size:
                raise InputError(f"shard {self._name(shard)} was cut short while being read; restore or re-encode it")

    def check(self, shard: int) -> Index:
        """Verify one shard fully (size, hash, structure, labels)."""
        return self._open(shard)[1]

    def _name(self, shard: int) -> str:
        return f"{self.path}/{self.manifest.table['name'][shard].decode()}"

    def _open(self, shard: int) -> tuple[_File, Index]:
        with self._opening[shard % len(self._opening)]:
            with self._lock:
                file, known = self._files.get(shard), self._index.get(shard)
            if file is None:
                file = self._open_file(shard)
            if self.cache is not None and known is None:
                file, known = self._verify_cached(shard, file)
            elif known is None or known[1] != file.identity:
                known = self._verify(shard, file), file.identity
            with self._lock:
                _remember(self._files, shard, file, FILES_KEPT)
                _remember(self._index, shard, known, INDEXES_KEPT)
            return file, known[0]

    def fetch(self, shard: int) -> Path:
        """Where a shard is on this node, downloaded first if it is remote."""
        row = self.manifest.table[shard]
        name = row["name"].decode()
        if self.cache is None:
            return Path(self.path) / name
        return self.cache.fetch(name, int(row["xxh64"]), int(row["bytes"]))

    def _open_file(self, shard: int) -> _File:
        for _ in range(3):  # a cached file may be evicted between the two calls
            path = self.fetch(shard)
            try:
                return _File(path)
            except FileNotFoundError:
                if self.cache is None:
                    break
            except OSError as error:
                raise file_error(f"shard {path}", error, "restore it") from None
        if self.cache is not None:
            raise RunError(f"{path} keeps vanishing from data.cache_dir; raise data.cache_gb, or leave the cache alone")
        raise InputError(f"shard {self._name(shard)} is missing; restore it or encode the data again")

    def _verify_cached(self, shard: int, file: _File) -> tuple[_File, tuple[Index, tuple[int, int, int]]]:
        """Verify; a file that was damaged on this node's disk is downloaded once more."""
        assert self.cache is not None
        try:
            return file, (self._verify(shard, file), file.identity)
        except InputError:
            row = self.manifest.table[shard]
            self.cache.drop(int(row["xxh64"]), int(row["bytes"]))
            file = self._open_file(shard)
        try:
            return file, (self._verify(shard, file), file.identity)
        except InputError as error:  # it came whole: the cache compares hashes before it keeps anything
            where = self.cache.path(int(row["xxh64"]), int(row["bytes"]))
            raise RunError(
                f"the copy {where} of a shard was damaged on this node's disk, twice ({error}); check that disk, or "
                "choose another data.cache_dir"
            ) from None

    def _verify(self, shard: int, file: _File) -> Index:
        """Read the whole file once: hash it and find its samples."""
        row, name = self.manifest.table[shard], self._name(shard)
        size = file.identity[1]
        if size != row["bytes"]:
            raise InputError(f"shard {name} is damaged: {size:,} bytes instead of {int(row['bytes']):,}; re-encode it")
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:
            read = os.preadv(file.fd, [content[done:].data], done)  # at most 2 GB a call
            if read == 0:
                raise InputError(f"shard {name} was cut short while being read; restore it or encode the data again")
            done += read
        if xxhash.xxh64_intdigest(content.data) != row["xxh64"]:
            raise InputError(
                f"shard {name} is damaged: its hash is not the manifest's; restore it or encode the data again"
            )
        index = INDEX[self.manifest.format](content, self.manifest.layout, name)
        if len(index) != row["samples"]:
            raise InputError(
                f"shard {name} holds {len(index)} samples, its manifest says {row['samples']}; re-index it"
            )
        if len(index) and not 0 <= index.label_n.min() <= index.label_n.max() < len(self.manifest.classes):
            raise InputError(
                f"shard {name} has labels outside of its {len(self.manifest.classes)} classes; re-index it"
            )
        return index


def _remember(kept: OrderedDict[int, T], key: int, value: T, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)


def open_shards(
    path: str | Path,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    load: Callable[[str | Path], Manifest] = Manifest.load,
) -> LatentShards:
    """Open an output directory of `ldt encode` (or its `validation` split), local or at an fsspec address.

    Remote shards are kept in `cache_dir` on this node, at most `cache_gb` (10⁹ bytes) of them. load: reads the
    manifest; a rank may get it from another one instead.
    """
    if not is_remote(path):
        return LatentShards(Path(path), load(path))
    address = str(path).rstrip("/")
    if not cache_dir:
        raise InputError(f"data.path={address} is remote; give a directory of this node as data.cache_dir")
    if not cache_gb > 0:
        raise InputError(f"data.cache_gb={cache_gb} must be more than 0")
    return LatentShards(address, load(address), Cache(Remote(address), cache_dir, int(cache_gb * 1e9)))
