"""The manifest of a directory of latent shards: a small JSON head and a binary table with one row a shard.

`shards.npy` is written first and `manifest.json`, which holds its hash, last: a directory with a manifest is whole.
The table is read without parsing text: 100,000 shards cost 6 MB and a few milliseconds.
"""

import io
import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldt.data.latent_spec import LARGEST_LATENT, LatentSpec
from ldt.data.shard_files import BUCKETS, HEAD, RECIPE, TABLE, VALIDATION
from ldt.data.shards.layout import STORED, Layout
from ldt.data.shards.remote import Remote
from ldt.errors import InputError, file_error
from ldt.files import load_npy, natural, schema_error, write_atomic
from ldt.paths import is_remote

VERSION = 5  # 2 had no captions, 3 no data without a posterior and no whitening by element, 4 no targets
READABLE = (2, 3, 4, VERSION)
_SCHEMA = {"format": str, "dtype": str, "flips": bool, "class_counts": [natural], "recipe": dict}
_TARGET = {"name": str, "hash": str, "dtype": lambda v: v == "fp16", "shape": lambda v: _is_shape(v)}
_OPTIONAL = {"captions": bool, "posterior": bool, "target": lambda v: not schema_error(v, _TARGET)}
_NUMBERS = [("bytes", "<i8"), ("samples", "<i8"), ("xxh64", "<u8"), ("content", "<u8")]


@dataclass(frozen=True, kw_only=True)
class Manifest(LatentSpec):
    """What a shard directory holds.

    format: tar or mds; dtype: of the stored moments; flips: whether those of the mirrored images are there too; table:
    structured array, one row a shard: name (bytes), bytes, samples, xxh64 of the file, and content, an xxh64 of labels
    and moments alone, which is the same in both formats. recipe: how it was made. captions: whether samples have them;
    caption_counts: how many are `captioned`, `empty` and `cut` at the encoder's length. source: a hash of the names and
    sizes of the files that were encoded, empty where that is not known.
    posterior: whether their moments have a standard deviation beside the mean. target: of features of patches in the
    samples, the `name` and the `hash` of the network that made them, their `shape` [D, G, G] and `dtype`; or empty.
    """

    format: str
    dtype: str
    flips: bool
    table: NDArray[np.void] = field(repr=False)
    recipe: dict[str, Any] = field(default_factory=dict)
    captions: bool = False
    caption_counts: dict[str, int] = field(default_factory=dict)
    source: str = ""
    posterior: bool = True
    target: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """How a sample lies in a shard."""
        shape = tuple(self.target["shape"]) if self.target else None
        return Layout(self.latent_shape, self.dtype, self.flips, self.captions, self.text_shape, self.posterior, shape)

    @property
    def _version(self) -> int:
        """The lowest format version that can express this manifest, so that older programs read what they can."""
        if self.target:
            return VERSION
        if self.by_element or not self.posterior:
            return 4
        return 3 if self.captions else 2

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
        what: list[Any] = [list(self.latent_shape), self.dtype, self.flips, self.classes]
        if self.captions:
            what.append({k: v for k, v in self.text.items() if k != "examples"})
        if not self.posterior:
            what.append("no posterior")
        if self.target:
            what.append(self.target)
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
            "version": self._version,
            "format": self.format,
            "samples": self.samples,
            "shards": len(self.table),
            "dtype": self.dtype,
            "flips": self.flips,
            **{k: v for k, v in self.to_json().items() if k != "text"},
            "fingerprint": self.fingerprint,
            "table_xxh64": xxhash.xxh64_hexdigest(out.getvalue()),
            "recipe": self.recipe,
        }
        if self.captions:
            head |= {"captions": True, "text": self.text, "caption_counts": self.caption_counts}
        if self.source:
            head["source"] = self.source
        if not self.posterior:
            head |= {"posterior": False}
        if self.target:
            head["target"] = self.target
        head["head_xxh64"] = head_hash(head)
        write_atomic(directory / HEAD, json.dumps(head, indent=1).encode())

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read and check head and table of a local directory or an fsspec address."""
        head = read_head(directory)
        try:
            return cls._from_head(head, directory)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{place(directory, HEAD)} is damaged or not ours ({error!r}); encode or index the data again"
            ) from None

    @classmethod
    def _from_head(cls, head: dict[str, Any], directory: str | Path) -> "Manifest":
        present = {key: shape for key, shape in _OPTIONAL.items() if key in head}
        if wrong := schema_error(head, _SCHEMA | present, "its head"):
            raise InputError(f"{place(directory, HEAD)} is damaged: {wrong}; encode or index the data again")
        try:
            spec = LatentSpec.from_json(head)
        except ValueError as error:
            raise InputError(f"{place(directory, HEAD)} is damaged: {error}; encode or index the data again") from None
        table = _load_table(directory, head["table_xxh64"])
        if head["format"] not in ("tar", "mds") or head["dtype"] not in STORED:
            raise InputError(
                f"{place(directory, HEAD)} has format {head['format']!r} and dtype {head['dtype']!r}; known are tar, "
                f"mds and {', '.join(STORED)}; encode or index the data again"
            )
        manifest = cls(
            **vars(spec.spec),
            format=head["format"],
            dtype=head["dtype"],
            flips=head["flips"],
            table=table,
            recipe=head["recipe"],
            captions=head.get("captions", False),
            caption_counts=head.get("caption_counts", {}),
            source=head.get("source", ""),
            posterior=head.get("posterior", True),
            target=head.get("target", {}),
        )
        if wrong := schema_error(manifest.caption_counts, {...: natural}, "its caption_counts"):
            raise InputError(f"{place(directory, HEAD)} is damaged: {wrong}; encode or index the data again")
        if head["fingerprint"] != manifest.fingerprint:
            raise InputError(
                f"{place(directory, HEAD)} does not belong to the table beside it; encode or index the data again"
            )
        return manifest


def _is_shape(value: Any) -> bool:
    """Of features of patches, in JSON."""
    return (
        isinstance(value, list) and len(value) == 3 and all(map(natural, value)) and 0 < prod(value) <= LARGEST_LATENT
    )


def make_table(rows: list[tuple[str, int, int, int, int]]) -> NDArray[np.void]:
    """The table from (name, bytes, samples, xxh64, content) of each shard."""
    names = [name.encode() for name, *_ in rows]
    width = max(map(len, names), default=1)
    return np.array([(n, *row[1:]) for n, row in zip(names, rows, strict=True)], [("name", f"S{width}"), *_NUMBERS])


def place(directory: str | Path, name: str) -> str:
    """The full name of a file of the directory, for messages and reading."""
    return f"{str(directory).rstrip('/')}/{name}"


def read_file(directory: str | Path, name: str) -> bytes:
    """A small file of a shard directory, wherever that is."""
    if is_remote(directory):
        return Remote(str(directory)).read(name)
    try:
        return (Path(directory) / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError from None
    except OSError as error:
        raise file_error(f"{directory}/{name}", error, "encode or index the data again") from None


def read_head(directory: str | Path) -> dict[str, Any]:
    """The JSON head of a shard directory, checked for kind, version and its own hash."""
    path = place(directory, HEAD)
    try:
        head = json.loads(read_file(directory, HEAD))
    except FileNotFoundError:
        raise InputError(_explain_absence(directory)) from None
    except InputError:  # is a ValueError too
        raise
    except ValueError:
        raise InputError(f"{path} is not readable as JSON; encode or index the data again") from None
    if not isinstance(head, dict) or head.get("kind") != "ldt latent shards":
        raise InputError(f"{path} is not a manifest of latent shards; give the output directory of `ldt encode`")
    if head.get("version") not in READABLE:
        raise InputError(
            f"{path} is of version {head.get('version')}, this ldt reads versions 2 to {VERSION}; encode or "
            "index the data again"
        )
    if head.get("head_xxh64") != head_hash(head):
        raise InputError(f"{path} is damaged: it does not belong to its own hash; encode or index the data again")
    return head


def open_validation(directory: str | Path) -> str | None:
    """Where the held-out split is, or None where the data were encoded without one."""
    if is_remote(directory):
        there = Remote(str(directory)).exists(f"{VALIDATION}/{HEAD}")
    else:
        there = (Path(directory) / VALIDATION / HEAD).exists()
    return place(directory, VALIDATION) if there else None


def _load_table(directory: str | Path, xxh64: str) -> NDArray[np.void]:
    path = place(directory, TABLE)
    try:
        content = read_file(directory, TABLE)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; encode or index the data again") from None
    if xxhash.xxh64_hexdigest(content) != xxh64:
        raise InputError(f"{path} is damaged: its hash is not the one in {HEAD}; encode or index the data again")
    try:
        table: NDArray[np.void] = load_npy(io.BytesIO(content))
        fields = dict(_NUMBERS) | {"name": table.dtype["name"].str}
        if table.ndim != 1 or {n: table.dtype[n].str for n in table.dtype.names or ()} != fields:
            raise ValueError(f"its rows are {table.dtype}")
        if table.dtype["name"].kind != "S" or min(table["bytes"].min(initial=0), table["samples"].min(initial=0)) < 0:
            raise ValueError("it holds negative numbers or names that are no text")
        names = np.ascontiguousarray(table["name"])
        if not names.tobytes().isascii():  # seldom, and slow to look at one by one
            for name in names.tolist():
                name.decode()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a table of shards ({error}); encode or index the data again") from None
    if b"/" in names.tobytes() or b".." in names.tobytes():
        for name in names.tolist():
            if name.startswith(b"/") or b".." in name.split(b"/"):
                raise InputError(f"{path} names shards outside of its directory ({name.decode()}); encode it again")
    return table


def head_hash(head: dict[str, Any]) -> str:
    """xxh64 of the head's content without the hash itself."""
    rest = {k: v for k, v in head.items() if k != "head_xxh64"}
    return xxhash.xxh64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _explain_absence(address: str | Path) -> str:
    if is_remote(address):
        return f"data path {address} has no {HEAD}; check the address or upload all of an output of `ldt encode`"
    directory = Path(address)
    if not directory.exists():
        return f"data path {directory} does not exist; make it with `ldt encode CONFIG output={directory}`"
    if (directory / BUCKETS).exists():
        names = sorted(p.parent.name for p in directory.glob(f"*/{HEAD}"))
        return f"{directory} holds buckets of several latent shapes; give one of them here: {', '.join(names)}"
    if (directory / RECIPE).exists():
        return f"{directory} is not completely encoded; run the same `ldt encode` command again and it goes on"
    if any(directory.glob("*.tar")) or any(directory.glob("*.mds")):
        return f"{directory} holds shards but no {HEAD}; run `ldt encode index={directory} autoencoder=NAME` once"
    if inside := sorted(p.parent.name for p in directory.glob(f"*/{HEAD}")):
        return f"{directory} has no {HEAD}, but {', '.join(inside[:3])} in it has one; give the directory that you mean"
    return f"{directory} has no {HEAD}; give the output directory of `ldt encode`"
