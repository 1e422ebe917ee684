"""Averages of any width, combined from those that a run's checkpoints and snapshots hold."""

from typing import Any

import torch
from torch import Tensor

from ldt import log
from ldt.checkpoint.checkpoint import Checkpoint, run_of
from ldt.checkpoint.manifest import Damaged, listed
from ldt.checkpoint.tensors import Reader
from ldt.engine import ema
from ldt.errors import InputError

logger = log.get_logger(__name__)


def reconstruct(checkpoint: Checkpoint, width: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The average of any width at a checkpoint, combined from those stored up to there; and what `model.json` says."""
    sources = _stored_averages(checkpoint)
    widths = sorted({width for *_, width in sources})
    if not widths[0] <= width <= widths[-1]:
        alone = "" if run_of(checkpoint.path) else "; it lies outside of its run, whose snapshots may hold more"
        raise InputError(
            f"ema_width={width} lies outside of the widths that {checkpoint.path} was trained with, {widths[0]} to "
            f"{widths[-1]}{alone}; choose one between them"
        )
    stored = [(source.samples_seen, source_width) for source, _, source_width in sources]
    coefficients = ema.reconstruction(stored, checkpoint.samples_seen, width)
    out: dict[str, Tensor] = {}
    made_from = {}
    with log.progress(len(sources), "average", "reconstruct") as bar:
        for (source, kind, _), coefficient in zip(sources, coefficients, strict=True):
            for name, tensor in Reader(source.path, source.manifest).full(kind).items():
                out.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64)).add_(tensor, alpha=coefficient)
            made_from[f"{source.samples_seen:012d}/{kind}"] = coefficient
            bar.update()
    facts = {
        "config": checkpoint.config,
        "sampling": checkpoint.manifest["sampling"],
        "samples_seen": checkpoint.samples_seen,
        "weights": f"power average of width {width:g}",
        "made_from": made_from,
    }
    return {name: tensor.float() for name, tensor in out.items()}, facts


def _stored_averages(checkpoint: Checkpoint) -> list[tuple[Checkpoint, str, float]]:
    """Power averages stored up to the checkpoint, one for each time and width: (checkpoint, kind, width), oldest first.

    Those of the checkpoint itself and, where it lies in a run, of the run's other checkpoints and snapshots.
    """
    run_dir = run_of(checkpoint.path)
    found = {}
    for path in [] if run_dir is None else [*listed(run_dir / "checkpoints"), *listed(run_dir / "ema")]:
        try:
            other = Checkpoint.read(path).verify()
        except Damaged as error:
            logger.warning("left out: %s", error)
            continue
        found[other.samples_seen] = other
    found[checkpoint.samples_seen] = checkpoint
    out = []
    for _, source in sorted((seen, source) for seen, source in found.items() if seen <= checkpoint.samples_seen):
        for kind, profile in source.manifest.get("averages", {}).items():
            if profile["kind"] == "power":
                out.append((source, kind, float(profile["width"])))
    if not out:
        raise InputError(
            f"{checkpoint.path} holds no power averages to reconstruct others from; train with ema.kind=power"
        )
    return out
