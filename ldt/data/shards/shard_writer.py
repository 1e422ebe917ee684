"""A unit of encoding: one output shard, written whole and then vouched for by a sidecar.

A unit is done iff its sidecar is there, undamaged, and the shard beside it has the size that it gives. Sidecars live
until the manifest is written; any process may do any unit, and doing one twice changes nothing.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ldt.data.shards import mds, tar
from ldt.data.shards.layout import Layout, Samples
from ldt.data.shards.statistics import Sums
from ldt.files import natural, parse_json, real, schema_error, write_atomic

HASH = "sidecar_xxh64"
PACK = {"tar": tar.pack, "mds": mds.pack}


def _hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


_SHAPE = dict.fromkeys(("bytes", "samples", "elements"), natural) | {"name": str, "xxh64": _hash, "content": _hash}
_SHAPE |= {"class_counts": [natural], "first_C": [real], "second_C": [real], "source": str, "captions": {...: natural}}


@dataclass(frozen=True)
class Sidecar:
    """What is known of a finished shard; hashes as hexadecimal text.

    source: of the files that it was made of; captions: how many samples are `captioned`, `empty` and `cut`.
    """

    name: str
    bytes: int
    samples: int
    xxh64: str
    content: str
    class_counts: list[int]
    first_C: list[float]
    second_C: list[float]
    elements: int
    source: str = ""
    captions: dict[str, int] = field(default_factory=dict)

    @property
    def row(self) -> tuple[str, int, int, int, int]:
        """Its row of the manifest's table."""
        return self.name, self.bytes, self.samples, int(self.xxh64, 16), int(self.content, 16)

    @property
    def sums(self) -> Sums:
        return Sums(np.array(self.first_C), np.array(self.second_C), self.elements)


def shard_name(number: int, format: str) -> str:
    """File name of the output shard of a unit."""
    return f"shard-{number:08d}.{format}"


def sidecar_path(directory: Path, name: str) -> Path:
    """Where the sidecar of a shard is."""
    return directory / f"{name}.json"


@dataclass(frozen=True)
class Origin:
    """Where the samples of a shard come from.

    first: the number of the first of them in the data set; source, captions: as `Sidecar` has them.
    """

    first: int
    source: str = ""
    captions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of one directory. classes: how many the data set has."""

    directory: Path
    format: str
    layout: Layout
    classes: int

    def write(self, name: str, samples: Samples, sums: Sums, origin: Origin) -> None:
        """Write a shard, then its sidecar. sums: the statistics of its latents."""
        content = PACK[self.format](samples, self.layout, origin.first)
        write_atomic(self.directory / name, content)
        sidecar = Sidecar(
            name=name,
            bytes=len(content),
            samples=len(samples),
            xxh64=f"{xxhash.xxh64_intdigest(content):016x}",
            content=f"{samples.content_hash():016x}",
            class_counts=np.bincount(samples.label_n, minlength=self.classes).tolist(),
            first_C=sums.first_C.tolist(),
            second_C=sums.second_C.tolist(),
            elements=sums.elements,
            source=origin.source,
            captions=origin.captions,
        )
        facts = asdict(sidecar)
        signed = json.dumps(facts | {HASH: sidecar_hash(facts)})
        write_atomic(sidecar_path(self.directory, name), signed.encode())


def read_sidecar(directory: Path, name: str) -> Sidecar | None:
    """The sidecar of a finished unit, or None where the unit has to be done."""
    try:
        facts = parse_json(sidecar_path(directory, name).read_bytes())
        if not isinstance(facts, dict) or facts.pop(HASH, "") != sidecar_hash(facts) or schema_error(facts, _SHAPE):
            return None
        sidecar = Sidecar(**facts)
        size = (directory / name).stat().st_size
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return sidecar if sidecar.name == name and sidecar.bytes == size else None


def sidecar_hash(facts: dict[str, Any]) -> str:
    """The hash of a sidecar's content, without the hash itself."""
    return xxhash.xxh64_hexdigest(json.dumps(facts, sort_keys=True).encode())
