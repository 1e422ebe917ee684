"""Data of several latent shapes: a directory of shards for each bucket, and `buckets.json`, which names them.

Every bucket is a whole output of `ldt encode` of its own, with its manifest and its held-out split; `buckets.json` is
written last and holds their fingerprints. What the network sees of them is whitened alike, by the statistics of all
samples together, so that a pixel means the same in every shape.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ldt.data.latent_spec import LatentSpec
from ldt.data.shard_files import BUCKETS
from ldt.data.shards.manifest import Manifest, head_hash, place, read_file
from ldt.data.shards.reader import LatentShards
from ldt.data.shards.sources import combined_facts, refuse_what_differs
from ldt.errors import InputError
from ldt.files import natural, parse_json, schema_error, write_atomic

VERSION = 1
AGAIN = "encode the data again"
_SCHEMA = {
    "buckets": {...: {"samples": natural, "fingerprint": str}},
    "recipe": dict,
}
OWN = ("latent shape", "image size")  # in what the buckets of one data set differ


@dataclass(frozen=True)
class BucketManifest(Manifest):
    """What the buckets hold together; `latent_shape` and `image_size` are those of the largest."""

    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Readable, as that of mixed sources."""
        return " ".join(f"{name}:{fingerprint}" for name, fingerprint in self.fingerprints.items())


class BucketShards:
    """The shards of several buckets by name, numbered through. What is read is read from one of `views`.

    statistics: a spec whose whitening is to be used, as that of the training data for a held-out split; by default
    that of all samples together. For a held-out split with fewer buckets the others are left out.
    """

    def __init__(self, path: str | Path, buckets: Mapping[str, LatentShards], statistics: LatentSpec | None = None):
        self.path, self.names = path, list(buckets)
        _refuse(str(path), {name: s.manifest for name, s in buckets.items()})
        self.manifest = _combined({name: s.manifest for name, s in buckets.items()})
        spec = statistics or self.manifest
        self.manifest = replace(self.manifest, mean_C=spec.mean_C, std_C=spec.std_C)
        self.views = [
            LatentShards(s.path, replace(s.manifest, mean_C=spec.mean_C, std_C=spec.std_C), s.cache)
            for s in buckets.values()
        ]
        self.cache = next((s.cache for s in self.views if s.cache), None)
        self.first_S = np.cumsum([0, *(len(s.manifest.table) for s in self.views)])

    def fetch(self, shard: int) -> Path:
        """Where a shard is on this node, downloaded first if it is remote."""
        bucket = int(np.searchsorted(self.first_S, shard, "right")) - 1
        return self.views[bucket].fetch(shard - int(self.first_S[bucket]))


def read_buckets(directory: str | Path) -> dict[str, str] | None:
    """The fingerprint of each bucket by name; None where a directory has no buckets."""
    path = place(directory, BUCKETS)
    try:
        head = parse_json(read_file(directory, BUCKETS))
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path} is not readable as JSON; {AGAIN}") from None
    if not isinstance(head, dict) or head.get("kind") != "ldt latent buckets" or head.get("version") != VERSION:
        raise InputError(f"{path} is not a list of buckets of version {VERSION}; {AGAIN}")
    if head.get("head_xxh64") != head_hash(head) or schema_error(head, _SCHEMA):
        raise InputError(f"{path} is damaged: it does not belong to its own hash; {AGAIN}")
    for name in head["buckets"]:
        if "/" in name or name in ("", ".", ".."):
            raise InputError(f"{path} names a bucket outside of its directory ({name!r}); {AGAIN}")
    return {name: entry["fingerprint"] for name, entry in head["buckets"].items()}


def check_buckets(directory: str | Path, known: Mapping[str, str], buckets: Mapping[str, LatentShards]) -> None:
    """Refuse buckets that are not those that `buckets.json` was written of."""
    for name, shards in buckets.items():
        if shards.manifest.fingerprint != known[name]:
            raise InputError(f"{place(directory, name)} is not the bucket that {BUCKETS} was written of; {AGAIN}")


def write_buckets(directory: Path, manifests: Mapping[str, Manifest], recipe: dict[str, Any]) -> None:
    """Name the buckets of a directory, all of which are whole; refuses those that can't be trained on together."""
    _refuse(str(directory), manifests)
    head: dict[str, Any] = {
        "kind": "ldt latent buckets",
        "version": VERSION,
        "buckets": {name: {"samples": m.samples, "fingerprint": m.fingerprint} for name, m in manifests.items()},
        "recipe": recipe,
    }
    head["head_xxh64"] = head_hash(head)
    write_atomic(directory / BUCKETS, json.dumps(head, indent=1).encode())


def _refuse(path: str, manifests: Mapping[str, Manifest]) -> None:
    """`InputError` names what buckets must have in common and have not, or must not have and have."""
    shapes: dict[tuple[int, int, int], str] = {}
    for name, m in manifests.items():
        if m.by_element:
            raise InputError(
                f"bucket {name} of {path} is whitened by element, and statistics of one latent shape fit no other; "
                "encode with whitening=channel"
            )
        if m.samples == 0:
            raise InputError(f"bucket {name} of {path} holds no samples; leave it out of images.buckets")
        if m.latent_shape in shapes:
            raise InputError(f"buckets {shapes[m.latent_shape]} and {name} of {path} have the same latent shape")
        shapes[m.latent_shape] = name
    refuse_what_differs({f"bucket {name} of {path}": m for name, m in manifests.items()}, OWN)


def _combined(manifests: dict[str, Manifest]) -> BucketManifest:
    """The manifest of all samples together, of the shape of the bucket with the largest latents."""
    samples_S = np.array([m.samples for m in manifests.values()])
    facts = combined_facts(list(manifests.values()), samples_S / samples_S.sum())
    largest = max(manifests.values(), key=lambda m: (prod(m.latent_shape), m.latent_shape))
    buckets = {name: {"latent_shape": list(m.latent_shape), "samples": m.samples} for name, m in manifests.items()}
    facts |= {"latent_shape": largest.latent_shape, "image_size": largest.image_size, "buckets": buckets}
    return BucketManifest(**facts, fingerprints={name: m.fingerprint for name, m in manifests.items()})
