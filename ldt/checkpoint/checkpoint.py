"""A checkpoint on disk, known by what its manifest says and never by what its directory is called.

So a checkpoint may be copied, renamed, moved or linked (`cp -r RUN/checkpoints/000000006400 best`) and is still read
like the one in its run. An exported model (`ldt export`, `ldt import`) is told apart by its `model.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldt.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    MODEL,
    Damaged,
    TrainState,
    listed,
    read_manifest,
    read_spec,
    verify_file,
)
from ldt.data.latent_spec import LatentSpec
from ldt.errors import InputError
from ldt.files import parse_json


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is, and its checked manifest; `read` makes one."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """`Damaged` unless the manifest is whole; the tensors' files are not looked at."""
        return cls(path, read_manifest(path))

    @property
    def samples_seen(self) -> int:
        """The clock: how many samples the run had seen."""
        return self.state.samples_seen

    @property
    def state(self) -> "TrainState":
        """The state of the run besides its tensors."""
        return TrainState.read(self.manifest["progress"])

    @property
    def spec(self) -> LatentSpec:
        """The facts of the training data."""
        return read_spec(self.manifest["sampling"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the attempt that wrote it."""
        return dict(self.manifest["config"])

    @property
    def hash(self) -> str:
        """Identifies the checkpoint: the hash of its manifest, which holds those of its files."""
        return (self.path / MANIFEST_HASH).read_text().strip()

    def verify(self) -> "Checkpoint":
        """Read every byte; `Damaged` names the file that differs from the manifest. Returns itself."""
        for name, entry in self.manifest["files"].items():
            verify_file(self.path / name, entry)
        return self


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    return [p for p in listed(run_dir / "checkpoints") if (p / MANIFEST).exists()]


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run directory."""
    if (path / MANIFEST).exists():
        return path
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory or a checkpoint")
    if (path / MODEL).exists():
        raise InputError(f"{path} is an exported model and no checkpoint; give the run or the checkpoint it came from")
    if not checkpoints_of(path):
        raise InputError(
            f"{path} is neither a checkpoint nor a run with a complete one; train first, or give another path"
        )
    return checkpoints_of(path)[-1]


def run_of(path: Path) -> Path | None:
    """The run directory that a checkpoint lies in, by its own path or where a link leads; None for one outside."""
    for place in (path.absolute(), path.resolve()):
        if place.parent.name == "checkpoints" and (place.parent.parent / "config.yaml").is_file():
            return place.parent.parent
    return None


def results_of(path: Path) -> Path:
    """The directory for what is made with a checkpoint or an exported model.

    The run it lies in or the exported model's own; for a checkpoint outside of a run, `<its name>-results` in the
    current directory.
    """
    if (path / MODEL).exists():
        return path
    return run_of(path) or Path(f"{path.resolve().name}-results")


def saved_config(path: Path) -> dict[str, Any]:
    """The config that a run, a checkpoint or an exported model was made with; empty where it says nothing readable."""
    run_dir = path if (path / "config.yaml").is_file() else run_of(path)
    try:
        if run_dir is not None:
            content = yaml.safe_load((run_dir / "config.yaml").read_text())
        elif (path / MODEL).is_file():
            content = parse_json((path / MODEL).read_bytes())["config"]
        else:
            content = Checkpoint.read(path).config
    except (Damaged, InputError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}  # whoever reads the path itself says what is wrong with it
    return content if isinstance(content, dict) else {}
