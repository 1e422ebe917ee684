"""The manifest of a directory of latent shards: a small JSON head and a binary table with one row a shard.

`shards.npy` is written first and `manifest.json`, which holds its hash, last: a directory with a manifest is whole.
The table is read without parsing text: 100,000 shards cost 6 MB and a few milliseconds.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldt.data.shards.files import write_atomic
from ldt.data.shards.layout import STORED, Layout
from ldt.errors import InputError

VERSION = 1
HEAD, TABLE = "manifest.json", "shards.npy"
VALIDATION = "validation"
_NUMBERS = [("bytes", "<i8"), ("samples", "<i8"), ("xxh64", "<u8"), ("content", "<u8")]


@dataclass(frozen=True)
class Manifest:
    """What a shard directory holds.

    table: structured array, one row a shard: name (bytes), bytes, samples, xxh64 of the file, and content, an xxh64 of
    labels and moments alone, which is the same in both formats. mean_C, std_C: float64, statistics over all posterior
    draws, with which latents are whitened. class_counts: samples of each class. recipe: how it was made.
    """

    format: str
    latent_shape: tuple[int, int, int]
    dtype: str
    flips: bool
    classes: list[str]
    class_counts: list[int]
    mean_C: NDArray[np.float64]
    std_C: NDArray[np.float64]
    autoencoder: str
    autoencoder_hash: str
    image_size: int
    image_channels: int
    table: NDArray[np.void] = field(repr=False)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout(self.latent_shape, self.dtype, self.flips)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.ascontiguousarray(self.table["samples"])

    @property
    def samples(self) -> int:
        return int(self.table["samples"].sum())

    @property
    def fingerprint(self) -> str:
        """Identifies the data: labels, moments and their order, not the file format or who wrote it."""
        what = [list(self.latent_shape), self.dtype, self.flips, self.classes]
        digest = xxhash.xxh3_128(json.dumps(what).encode())
        digest.update(np.ascontiguousarray(self.table["samples"]).data)
        digest.update(np.ascontiguousarray(self.table["content"]).data)
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write table and head into a directory whose shards are all in place."""
        out = io.BytesIO()
        np.save(out, self.table, allow_pickle=False)
        write_atomic(directory / TABLE, out.getvalue())
        head = {
            "kind": "ldt latent shards",
            "version": VERSION,
            "format": self.format,
            "samples": self.samples,
            "shards": len(self.table),
            "latent_shape": list(self.latent_shape),
            "dtype": self.dtype,
            "flips": self.flips,
            "classes": self.classes,
            "class_counts": self.class_counts,
            "mean_C": self.mean_C.tolist(),
            "std_C": self.std_C.tolist(),
            "autoencoder": self.autoencoder,
            "autoencoder_hash": self.autoencoder_hash,
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "fingerprint": self.fingerprint,
            "table_xxh64": xxhash.xxh64_hexdigest(out.getvalue()),
            "recipe": self.recipe,
        }
        write_atomic(directory / HEAD, json.dumps(head, indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read and check head and table."""
        head = read_head(directory)
        path = directory / TABLE
        table = _load_table(path, head["table_xxh64"])
        if head["format"] not in ("tar", "mds") or head["dtype"] not in STORED:
            raise InputError(
                f"{directory / HEAD} has format {head['format']!r} and dtype {head['dtype']!r}; known are tar, mds and "
                f"{', '.join(STORED)}; encode or index the data again"
            )
        manifest = cls(
            format=head["format"],
            latent_shape=tuple(head["latent_shape"]),
            dtype=head["dtype"],
            flips=head["flips"],
            classes=head["classes"],
            class_counts=head["class_counts"],
            mean_C=np.array(head["mean_C"], np.float64),
            std_C=np.array(head["std_C"], np.float64),
            autoencoder=head["autoencoder"],
            autoencoder_hash=head["autoencoder_hash"],
            image_size=head["image_size"],
            image_channels=head["image_channels"],
            table=table,
            recipe=head["recipe"],
        )
        if head["fingerprint"] != manifest.fingerprint:
            raise InputError(
                f"{directory / HEAD} does not belong to the table beside it; encode or index the data again"
            )
        return manifest


def make_table(rows: list[tuple[str, int, int, int, int]]) -> NDArray[np.void]:
    """The table from (name, bytes, samples, xxh64, content) of each shard."""
    names = [name.encode() for name, *_ in rows]
    width = max(map(len, names), default=1)
    return np.array([(n, *row[1:]) for n, row in zip(names, rows, strict=True)], [("name", f"S{width}"), *_NUMBERS])


def read_head(directory: Path) -> dict[str, Any]:
    """The JSON head of a shard directory, checked for kind and version."""
    path = directory / HEAD
    try:
        head = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(_explain_absence(directory)) from None
    except (ValueError, UnicodeDecodeError):
        raise InputError(f"{path} is not readable as JSON; encode or index the data again") from None
    if not isinstance(head, dict) or head.get("kind") != "ldt latent shards":
        raise InputError(f"{path} is not a manifest of latent shards; give the output directory of `ldt encode`")
    if head.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {head.get('version')}, this ldt reads version {VERSION}; encode or "
            "index the data again"
        )
    return head


def open_validation(directory: str | Path) -> Path | None:
    """The directory of the held-out split, or None where the data were encoded without one."""
    path = Path(directory) / VALIDATION
    return path if (path / HEAD).exists() else None


def _load_table(path: Path, xxh64: str) -> NDArray[np.void]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; encode or index the data again") from None
    if xxhash.xxh64_hexdigest(content) != xxh64:
        raise InputError(f"{path} is damaged: its hash is not the one in {HEAD}; encode or index the data again")
    table: NDArray[np.void] = np.load(io.BytesIO(content), allow_pickle=False)
    for name in np.unique(np.char.rpartition(table["name"], b"/")[:, 0]).tolist() if len(table) else []:
        if name.startswith(b"/") or b".." in name.split(b"/"):
            raise InputError(f"{path} names shards outside of its directory ({name.decode()}); encode the data again")
    return table


def _explain_absence(directory: Path) -> str:
    if not directory.exists():
        return f"data path {directory} does not exist; make it with `ldt encode`"
    if (directory / "encode.json").exists():
        return f"{directory} is not completely encoded; run the same `ldt encode` command again and it goes on"
    if any(directory.glob("*.tar")) or any(directory.glob("*.mds")):
        return f"{directory} holds shards but no {HEAD}; run `ldt encode --index {directory}` once"
    return f"{directory} has no {HEAD}; give the output directory of `ldt encode`"
