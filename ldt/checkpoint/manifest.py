"""What a checkpoint is: a directory with one safetensors file from each rank and a manifest that hashes them.

A directory without a manifest, or whose bytes differ from the manifest's hashes, is not a checkpoint.
docs/checkpoints.md is the specification.
"""

import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ldt import __version__
from ldt.data.latent_spec import LatentSpec
from ldt.errors import InputError
from ldt.files import natural, parse_json, real, schema_error

FORMAT, VERSION = "ldt-checkpoint", 3
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.xxh64"
MODEL, WEIGHTS = "model.json", "model.safetensors"  # of an exported model
CHUNK = 1 << 24
_SCHEMA = {
    "version": natural,
    "rng_version": natural,
    "optimizer_steps": natural,
    "parameters": {...: [natural]},
    "tensors": [str],
    "files": {...: {"bytes": natural, "xxh64": str, "ranges": {...: [natural]}}},
    "progress": {"samples_seen": natural, "data_fingerprint": str},
    "sampling": dict,
    "config": {"model": dict, "objective": dict},
    "written_by": {"world_size": natural, "zero_stage": natural, "ldt": str},
}


@dataclass
class TrainState:
    """The state of a run besides its tensors.

    skipped: the first position of each step that changed no weights. recent_losses: those of the newest steps, oldest
    first, kept where loss spikes are detected. rolled_back: whether bad steps have rolled the run back, which happens
    at most once. avoid: the first position of each step that is passed over since then.
    """

    samples_seen: int
    data_fingerprint: str
    skipped: list[int] = field(default_factory=list)
    attempt: int = 0
    recent_losses: list[float] = field(default_factory=list)
    rolled_back: bool = False
    avoid: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, facts: Any) -> "TrainState":
        """Make a state from parsed JSON; raises `Damaged` where the JSON holds anything else."""
        try:
            progress = cls(**facts)
        except TypeError as error:
            raise Damaged(f"progress: {error}") from None
        shape = {"samples_seen": natural, "data_fingerprint": str, "skipped": [natural], "attempt": natural}
        shape |= {"recent_losses": [real], "rolled_back": bool, "avoid": [natural]}
        _check(vars(progress), shape, "progress")
        return progress


def read_spec(facts: Any) -> LatentSpec:
    """The facts of the training data in a manifest; `Damaged` where they are not as they should be."""
    try:
        return LatentSpec.from_json(facts)
    except ValueError as error:
        raise Damaged(f"sampling: {error}") from None


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the message names the file."""


def versions() -> dict[str, str]:
    """The versions of the software that writes a checkpoint or a result."""
    return {
        "ldt": __version__,
        "torch": version("torch"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def listed(root: Path) -> list[Path]:
    """Complete-looking checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a checkpoint directory; `Damaged` if it is missing or altered."""
    try:
        text = (path / MANIFEST).read_bytes()
        expected = (path / MANIFEST_HASH).read_text().strip()
    except OSError as error:
        raise Damaged(f"{path} has no readable {Path(error.filename).name}; it was not written to the end") from None
    except UnicodeDecodeError:
        raise Damaged(f"{path / MANIFEST_HASH} is not a hash") from None
    if xxhash.xxh64(text).hexdigest() != expected:
        raise Damaged(f"{path / MANIFEST} differs from its hash")
    try:
        manifest: dict[str, Any] = parse_json(text)
    except ValueError:
        raise Damaged(f"{path / MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not an ldt checkpoint; its manifest does not say format {FORMAT!r}")
    if natural(manifest.get("version")) and manifest["version"] > VERSION:
        raise InputError(
            f"checkpoint {path} has format version {manifest['version']}; this ldt reads up to {VERSION}: upgrade ldt"
        )
    try:
        _check(manifest, _SCHEMA, "it")
        _check(absent_of(manifest), {...: [str]}, "absent")
        _check_ranges(manifest)
        read_spec(manifest["sampling"])
        TrainState.read(manifest["progress"])
    except Damaged as error:
        raise Damaged(f"{path / MANIFEST} is not as it should be: {error}") from None
    return manifest


def _check(value: Any, shape: Any, name: str) -> None:
    if wrong := schema_error(value, shape, name):
        raise Damaged(wrong)


def absent_of(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """The parameters of which a kind of tensor is not stored and zero: all are, before format version 3."""
    absent: dict[str, list[str]] = manifest.get("absent", {})
    return absent


def _check_ranges(manifest: dict[str, Any]) -> None:
    """Check that files lie in the directory, are large enough, and hold each element of each parameter once."""
    absent = {kind: set(names) for kind, names in absent_of(manifest).items() if kind in manifest["tensors"]}
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest["parameters"]}
    for file, entry in manifest["files"].items():
        if Path(file).name != file:
            raise Damaged(f"file {file!r} lies outside of the checkpoint")
        for name, where in entry["ranges"].items():
            if len(where) != 2 or name not in held:
                raise Damaged(f"{file} holds {name} {where}")
            held[name].append((where[0], where[1]))
        elements = sum(count for _, count in entry["ranges"].values())
        left_out = sum(entry["ranges"].get(name, (0, 0))[1] for names in absent.values() for name in names)
        if entry["bytes"] < 4 * (len(manifest["tensors"]) * elements - left_out):
            raise Damaged(f"{file} of {entry['bytes']} bytes is too small for {elements} elements")
    for name, ranges in held.items():
        end = 0
        for start, count in sorted(ranges):
            if start != end:
                raise Damaged(f"element {min(start, end)} of {name} is missing or there twice")
            end += count
        if end != math.prod(manifest["parameters"][name]):
            raise Damaged(f"{end} elements of {name} are held, not {math.prod(manifest['parameters'][name])}")


def verify_file(path: Path, entry: dict[str, Any]) -> None:
    """`Damaged` unless the file has the size and hash that the manifest gives."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes instead of {entry['bytes']}")
        digest = xxhash.xxh64()
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise Damaged(f"{path} can't be read: {error.strerror}") from None
    if digest.hexdigest() != entry["xxh64"]:
        raise Damaged(f"{path} differs from its hash in the manifest")
