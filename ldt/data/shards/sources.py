"""Several shard directories read as one: their shards are numbered through, their statistics are those of the mixture.

Sources of one run may differ in format, precision and place, and must agree in all that the network sees.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt.data.latent_spec import pack_statistics
from ldt.data.mixture import shares
from ldt.data.shards.layout import TARGET_DTYPE
from ldt.data.shards.manifest import Manifest
from ldt.data.shards.reader import LatentShards, Records
from ldt.data.shards.statistics import seven_digits
from ldt.errors import InputError

EXAMPLES = 256  # captions kept, as by `ldt encode`


@dataclass(frozen=True)
class MixedManifest(Manifest):
    """What the sources hold together.

    parts: each source's weight as a part of their sum, in the order of their names; fingerprints: of each source.
    class_counts are those that so many samples of the mixture have on average.
    """

    parts: tuple[int, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The sources' names and fingerprints in one text, so that two can be compared source by source."""
        entries = zip(self.fingerprints.items(), self.parts, strict=True)
        return " ".join(f"{name}:{part}:{fingerprint}" for (name, fingerprint), part in entries)


class MixedShards:
    """The shards of several sources, by name. Like `LatentShards` of them all, one after another."""

    def __init__(self, sources: Mapping[str, LatentShards], weights: Mapping[str, float]) -> None:
        self.sources = dict(sorted(sources.items()))  # the order in which a config names them plays no part
        self.parts = shares({name: weights[name] for name in self.sources})
        for name, s in self.sources.items():
            if s.manifest.samples == 0:
                raise InputError(f"data.sources.{name} ({s.path}) holds no samples; leave it out or encode some images")
        self.manifest = _combined({name: s.manifest for name, s in self.sources.items()}, self.parts)
        self.path = ", ".join(f"{s.path}" for s in self.sources.values())
        self.cache = next((s.cache for s in self.sources.values() if s.cache), None)
        self._all = list(self.sources.values())
        self._first_S = np.cumsum([0, *(len(s.manifest.table) for s in self._all)])

    def read(
        self,
        shard_n: ArrayLike,
        sample_n: ArrayLike,
        flip_n: ArrayLike | None = None,
        text: bool = False,
        target: bool = False,
    ) -> Records:
        """As `LatentShards.read`."""
        shard_n, sample_n = np.asarray(shard_n, np.int64), np.asarray(sample_n, np.int64)
        source_n = np.searchsorted(self._first_S, shard_n, "right") - 1
        layout = self.manifest.layout
        moments = np.empty((len(shard_n), *layout.moments_shape), np.float32)
        label_n = np.empty(len(shard_n), np.int64)
        words = np.empty((len(shard_n), *layout.text_shape), layout.text_dtype) if text and layout.text else None
        features = np.empty((len(shard_n), *layout.target), TARGET_DTYPE) if target and layout.target else None
        for source in np.unique(source_n).tolist():
            here = np.flatnonzero(source_n == source)
            flips = None if flip_n is None else np.asarray(flip_n)[here]
            records = self._all[source].read(shard_n[here] - self._first_S[source], sample_n[here], flips, text, target)
            moments[here], label_n[here] = records.moments_n2CHW, records.label_n
            if words is not None:
                words[here] = records.text_n
            if features is not None:
                features[here] = records.target_n
        return Records(moments, label_n, words, features)

    def fetch(self, shard: int) -> Path:
        """Where a shard is on this node, downloaded first if it is remote."""
        source = int(np.searchsorted(self._first_S, shard, "right")) - 1
        return self._all[source].fetch(shard - int(self._first_S[source]))


Shards = LatentShards | MixedShards


def changed_sources(before: str, now: str) -> list[str]:
    """Names of the sources whose entries in two fingerprints of mixtures differ."""
    old, new = (dict(entry.split(":", 1) for entry in text.split() if ":" in entry) for text in (before, now))
    return sorted(name for name in old | new if old.get(name) != new.get(name))


def _combined(manifests: dict[str, Manifest], parts: dict[str, int]) -> MixedManifest:
    """The manifest of the mixture; `InputError` names sources that do not go together.

    A draw of the mixture is one of source s with probability p_s, so E[x] = Σ p_s·μ_s and E[x²] = Σ p_s·(σ_s² + μ_s²).
    """
    refuse_what_differs({f"data.sources.{name}": m for name, m in manifests.items()})
    facts = combined_facts(list(manifests.values()), np.array(list(parts.values())) / sum(parts.values()))
    fingerprints = {name: m.fingerprint for name, m in manifests.items()}
    return MixedManifest(**facts, parts=tuple(parts.values()), fingerprints=fingerprints)


def combined_facts(all_of: list[Manifest], p_S: NDArray[np.float64]) -> dict[str, Any]:
    """The fields of the manifest of several data sets from which samples are drawn with these probabilities."""
    mean_C, std_C = _mixed(p_S, [m.mean_C for m in all_of], [m.std_C for m in all_of])
    share_SK = np.stack([np.array(m.class_counts) / m.samples for m in all_of])
    first = all_of[0]
    facts = {f.name: getattr(first, f.name) for f in fields(Manifest)} | {
        "class_counts": np.rint(p_S @ share_SK * sum(m.samples for m in all_of)).astype(int).tolist(),
        "mean_C": mean_C.tolist(),
        "std_C": std_C.tolist(),
        "table": np.concatenate([m.table for m in all_of]),
        "recipe": {},
        "text": first.text and first.text | {"examples": _examples(all_of, p_S)},
    }
    if first.by_element:
        mean, std = _mixed(p_S, *([m.whitening[k].ravel() for m in all_of] for k in (0, 1)))
        facts |= {"mean_CHW": pack_statistics(mean), "std_CHW": pack_statistics(std)}
    return facts


def _mixed(
    p_S: NDArray[np.float64], mean_SC: Sequence[ArrayLike], std_SC: Sequence[ArrayLike]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the mixture, from those of the sources."""
    means, deviations = np.array(mean_SC, np.float64), np.array(std_SC, np.float64)
    mean_C = p_S @ means
    return seven_digits(mean_C), seven_digits(np.sqrt(p_S @ (deviations**2 + means**2) - mean_C**2))


def refuse_what_differs(manifests: dict[str, Manifest], but: Sequence[str] = ()) -> None:
    """Data sets must agree in all that the network and the autoencoder see, `but` in some; and must not be the same.

    Their names are those that a message gives them.
    """

    def seen(m: Manifest) -> dict[str, Any]:
        return {
            "channels": m.latent_shape[0],
            "latent shape": m.latent_shape,
            "autoencoder's hash": m.autoencoder_hash,
            "classes": m.classes,
            "flips": m.flips,
            "posterior": m.posterior,
            "whitening": "element" if m.by_element else "channel",
            "image size": (m.image_size, m.image_channels),
            "captions": m.captions,
            "text encoder": {k: v for k, v in m.text.items() if k != "examples"},
            "target": m.target,
        }

    for (name, one), (other, two) in itertools.combinations(manifests.items(), 2):
        for what, value in seen(one).items():
            if what not in but and value != seen(two)[what]:
                raise InputError(
                    f"{name} and {other} differ in their {what} ({_short(value)} and "
                    f"{_short(seen(two)[what])}); encode both alike, or train on one of them"
                )
        if one.fingerprint == two.fingerprint:
            raise InputError(f"{name} and {other} hold the same data; name them once and raise its weight")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _examples(manifests: list[Manifest], p_S: NDArray[np.float64]) -> list[Any]:
    """Captions of all sources, of each as many as its weight asks, spread over what it has."""
    out: list[Any] = []
    for manifest, p in zip(manifests, p_S.tolist(), strict=True):
        there = manifest.text["examples"]
        wanted = min(len(there), max(1, round(p * EXAMPLES)))
        out += [there[i * len(there) // wanted] for i in range(wanted)]
    return out
