"""Take one set of weights out of a run: parameters in their shapes as safetensors, and what sampling needs beside them.

Without `ema_width` it is the average that the run samples from (or its plain `weights=master`). With it, the average
of that width at the same number of samples is reconstructed from all that are stored: the run's checkpoints and the
snapshots of `ema.snapshot_every_samples` (Karras et al. 2312.02696, appendix C).

The directory is a model of its own: `ldt sample DIR`, `ldt evaluate DIR` and `train.init_from=DIR` take it, and
`model.safetensors` is an ordinary state dict. With `format=diffusers` it is a folder that
`diffusers.DiTPipeline.from_pretrained` loads, for adaLN-Zero models that diffusers' DiT can hold (docs/models.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldt import log
from ldt.checkpoint.average import reconstruct
from ldt.checkpoint.checkpoint import Checkpoint, resolve
from ldt.checkpoint.load import load_denoiser, read_weights, save_exported
from ldt.checkpoint.manifest import Damaged
from ldt.config_fields import choice, required_path_field
from ldt.convert.diffusers_dit import write_pipeline
from ldt.errors import InputError

logger = log.get_logger(__name__)


@dataclass
class ExportJob:
    """`run`: a run directory (its newest checkpoint) or a checkpoint; `to`: a directory that does not exist yet."""

    run: str = required_path_field()
    to: str = required_path_field()
    weights: str = choice("ema", "master")
    ema_width: float = 0.0
    format: str = choice("safetensors", "diffusers")

    def __post_init__(self) -> None:
        if self.ema_width < 0:
            raise InputError(
                f"ema_width={self.ema_width} must be positive, such as 0.07, or 0 for the run's own average"
            )
        if self.ema_width and self.weights != "ema":
            raise InputError(f"ema_width={self.ema_width} makes an average; remove weights={self.weights}")
        if self.ema_width and self.format == "diffusers":
            raise InputError("export with ema_width as safetensors first, and that directory with format=diffusers")


def run(config: ExportJob) -> int:
    """Write the exported model into the directory `to`."""
    target = Path(config.to)
    if target.exists():
        raise InputError(f"to={target} exists; give a directory that does not")
    if config.format == "diffusers":
        write_pipeline(load_denoiser(config.run, config.weights), target)
        print(f"for diffusers.DiTPipeline.from_pretrained: {target}")
        return 0
    path = resolve(Path(config.run))
    facts: dict[str, Any]
    try:
        checkpoint = Checkpoint.read(path)
        if config.ema_width:
            tensors, facts = reconstruct(checkpoint.verify(), config.ema_width)
        else:
            tensors, facts, digest = read_weights(path, config.weights)
            facts |= {"weights": config.weights, "made_from": {str(checkpoint.samples_seen): digest}}
    except Damaged as error:
        raise InputError(f"checkpoint {path} is damaged: {error}; use the one before it") from None
    save_exported(target, tensors, facts)
    millions = sum(t.numel() for t in tensors.values()) / 1e6
    print(f"{millions:.2f} M parameters ({facts['weights']}) at {facts['samples_seen']} samples: {target}")
    return 0
