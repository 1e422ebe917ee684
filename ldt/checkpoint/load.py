"""Reading a model without an engine, a process group or its data: from a checkpoint or from an exported model.

An exported model is a directory with `model.safetensors`, parameters in their shapes under their own names, and
`model.json`, everything that sampling needs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldt.checkpoint.average import reconstruct
from ldt.checkpoint.checkpoint import Checkpoint, resolve
from ldt.checkpoint.manifest import (
    MODEL,
    WEIGHTS,
    Damaged,
    read_spec,
    verify_file,
    versions,
)
from ldt.checkpoint.tensors import Reader, write_safetensors
from ldt.config import from_dict
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.errors import InputError, by_reason
from ldt.files import making, natural, parse_json, schema_error, write_synced
from ldt.nn.build import build
from ldt.nn.config import ModelConfig

_EXPORTED_SHAPE = {
    "config": {"model": dict, "objective": dict},
    "sampling": dict,
    "samples_seen": natural,
    "file": {"bytes": natural, "xxh64": str},
}


@dataclass
class Loaded:
    """A denoiser ready for sampling."""

    denoiser: nn.Module
    objective: Objective
    spec: LatentSpec
    config: dict[str, Any]
    samples_seen: int
    path: Path
    hash: str


def load_denoiser(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Loaded:
    """The denoiser of a run's newest checkpoint, of one checkpoint or of an exported model.

    `weights`: `ema`, `master`, another average of the checkpoint, or the width of one to be reconstructed.
    The files read are checked against their hashes.
    """
    directory = Path(path)
    if (directory / MODEL).exists():
        tensors, facts, digest = read_exported(directory)
    else:
        directory = resolve(directory)
        tensors, facts, digest = read_average(directory, weights)
    config = facts["config"]
    spec = read_spec(facts["sampling"])
    model = from_dict(ModelConfig, config["model"])
    classes, text = len(spec.classes), spec.text_shape
    try:
        with torch.device("meta"):  # a config that doesn't fit might describe a model that fits into no memory
            expected = build(model, spec.latent_shape, classes, seed=0, text=text, token=spec.token)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{directory} has a config of which no model can be built ({reason})") from None
    _check_fit(directory, {k: p.shape for k, p in expected.named_parameters() if p.requires_grad}, tensors)
    denoiser = build(model, spec.latent_shape, classes, seed=0, text=text, token=spec.token)
    denoiser.load_state_dict(tensors, strict=False)  # fixed positions are rebuilt, not stored
    return Loaded(
        denoiser=denoiser.to(device).eval(),
        objective=Objective(from_dict(ObjectiveConfig, config["objective"]), spec.latent_shape),
        spec=spec,
        config=config,
        samples_seen=facts["samples_seen"],
        path=directory,
        hash=digest,
    )


def _check_fit(directory: Path, expected: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    for name in [*expected, *tensors]:
        if name not in expected or name not in tensors:
            raise InputError(f"{directory} does not fit its own config: parameter {name} is in only one of them")
        if expected[name] != tensors[name].shape:
            raise InputError(
                f"{directory} does not fit its own config: parameter {name} is {list(tensors[name].shape)} and should "
                f"be {list(expected[name])}"
            )


def read_average(checkpoint: Path, weights: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """`read_weights` of a kind that the checkpoint holds, or of the average of a width such as 0.15."""
    if not weights[:1].isdigit():
        return read_weights(checkpoint, weights)
    try:
        width = float(weights)
        read = Checkpoint.read(checkpoint).verify()
    except ValueError:
        raise InputError(f"weights={weights} must be ema, master, another kind, or a width such as 0.15") from None
    except Damaged as error:
        raise InputError(f"checkpoint {checkpoint} is damaged: {error}; use the one before it") from None
    tensors, facts = reconstruct(read, width)
    return tensors, facts, f"{read.hash}-{width:g}"


def read_weights(checkpoint: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """All weights of one kind from a checkpoint, what `model.json` says about them, and the checkpoint's hash."""
    try:
        read = Checkpoint.read(checkpoint).verify()
        manifest = read.manifest
        if kind not in manifest["tensors"]:
            raise InputError(f"checkpoint {checkpoint} holds no {kind} weights, but {', '.join(manifest['tensors'])}")
        tensors = Reader(checkpoint, manifest).full(kind)
    except Damaged as error:
        raise InputError(f"checkpoint {checkpoint} is damaged: {error}; use the one before it") from None
    facts = {
        "config": manifest["config"],
        "sampling": manifest["sampling"],
        "samples_seen": read.samples_seen,
    }
    return tensors, facts, read.hash


def read_exported(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The weights of an exported model; its `model.json`; the hash of the weights file."""
    try:
        facts: dict[str, Any] = parse_json((directory / MODEL).read_bytes())
        if wrong := schema_error(facts, _EXPORTED_SHAPE, MODEL):
            raise Damaged(wrong)
        read_spec(facts["sampling"])
        verify_file(directory / WEIGHTS, facts["file"])
        return load_file(directory / WEIGHTS), facts, facts["file"]["xxh64"]
    except (Damaged, OSError, ValueError, SafetensorError) as error:
        raise by_reason(f"exported model {directory} is damaged: {error}; export it again", error) from None


def save_exported(directory: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write an exported model, whole or not at all: float32 tensors, and what `model.json` says of them."""
    with making(directory) as temporary:
        facts = facts | {
            "file": write_safetensors(temporary / WEIGHTS, tensors, {"format": "pt"}),
            "written_by": versions(),
        }
        write_synced(temporary / MODEL, json.dumps(facts, indent=1).encode())
