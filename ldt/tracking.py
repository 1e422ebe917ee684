"""Mirrors of metrics.jsonl in Weights & Biases and TensorBoard."""

import hashlib
import importlib.util
import logging
import os
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ldt.errors import InputError
from ldt.files import real
from ldt.log import get_logger


class Tracker(Protocol):
    """What mirrors metrics.jsonl, one line at a time."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracking:
    """metrics.jsonl's mirrors in Weights & Biases and TensorBoard; none on other ranks than 0. Close it by `with`.

    A mirror that breaks (its service was killed, its disk is full) is disabled with a warning; the run goes on.
    """

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = list(trackers)

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics; call it after the line is in metrics.jsonl."""
        for tracker in self._trackers.copy():
            self._try(tracker, tracker.log, record)

    def _try(self, tracker: Tracker, act: Callable[[Any], None], given: Any) -> None:
        try:
            act(given)
        except Exception as error:
            self._trackers.remove(tracker)
            get_logger(__name__).warning(
                "%s is lost (%s) and left out from here on; ldt replay sends it what metrics.jsonl holds",
                type(tracker).__name__,
                said_by(error),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers.copy():
            self._try(tracker, tracker.close, error is not None)


def track(run_dir: Path, config: dict[str, Any], rank: int, resumed_at: int = 0) -> Tracking:
    """The mirrors that `log.wandb` and `log.tensorboard` ask for (call on every rank).

    resumed_at: what TensorBoard's file holds beyond that many samples is of weights that are gone.
    """
    wanted = config.get("log") or {}
    if wanted.get("tensorboard"):
        require_tensorboard()
    if rank != 0:
        return Tracking()
    trackers: list[Tracker] = []
    if wanted.get("wandb"):
        trackers += start_or_warn(lambda: Wandb(run_dir, config))
    if wanted.get("tensorboard"):
        trackers += start_or_warn(lambda: TensorBoard(run_dir / "tensorboard", resumed_at))
    return Tracking(*trackers)


def start_or_warn(make: Callable[[], Tracker]) -> list[Tracker]:
    """The mirror, or None and a warning where it can't start: the run goes on without it."""
    try:
        return [make()]
    except Exception as error:
        get_logger(__name__).warning(
            "a mirror of the log can't start (%s); the run goes on without it, and ldt replay sends it later",
            said_by(error),
        )
        return []


def said_by(error: Exception) -> str:
    """A library's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Wandb:
    """A run in Weights & Biases: online with a key (WANDB_API_KEY or ~/.netrc), else offline; WANDB_MODE overrules.

    The same run directory is the same wandb run after every restart, at any world size, and is in the group of its
    name. Any other `job` (evaluation, replay) is a run of its own in that group each time, so that no two processes
    ever write one.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], job: str = "train") -> None:
        import wandb

        logging.raiseExceptions = False  # else its own log prints a traceback a line where its disk is full
        known = "WANDB_API_KEY" in os.environ or "wandb" in _read_text(Path("~/.netrc").expanduser())
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        training = job == "train"
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if known else "offline")
        keys: dict[str, Any] = {
            "project": "ldt",
            "id": identity if training else uuid.uuid4().hex[:16],
            "name": run_dir.name if training else f"{run_dir.name} {job}",
            "group": f"{run_dir.name}-{identity[:6]}",
            "job_type": job,
            "dir": run_dir,
            "config": config,
            "resume": "allow" if training else None,
            # what it would collect by itself (command line, patches of the source, the terminal) may hold secrets
            "settings": wandb.Settings(
                disable_git=True, disable_code=True, save_code=False, console="off", x_disable_meta=True
            ),
        }
        try:
            self._run = wandb.init(**keys, mode=mode)
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:200]
            get_logger(__name__).warning("wandb is not reached (%s); it goes on offline: wandb sync sends it", reason)
            self._run = wandb.init(**keys, mode="offline")
        self._run.define_metric("samples_seen")
        self._run.define_metric("*", step_metric="samples_seen")

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics."""
        self._run.log(record)

    def close(self, failed: bool) -> None:
        """Write or send what is left."""
        self._run.finish(exit_code=int(failed))


def require_tensorboard() -> None:
    """`InputError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "log.tensorboard=true needs TensorBoard; pip install ldt-train[tensorboard], or set log.tensorboard=false"
        )


class TensorBoard:
    """Event files with every number of every line over samples seen; `tensorboard --logdir RUN` shows them."""

    def __init__(self, directory: Path, resumed_at: int = 0) -> None:
        require_tensorboard()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, while it is imported
            from torch.utils.tensorboard import SummaryWriter
        threading.excepthook = _say_unless_tensorboard
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # else it finds out in a thread, whose traceback nobody can catch
            pass
        self._writer = SummaryWriter(str(directory), purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics; `samples_seen` is the step, `time` the wall clock."""
        seen, at = record["samples_seen"], record.get("time")
        for key, value in record.items():
            if real(value) and key not in ("samples_seen", "time"):
                self._writer.add_scalar(key, value, seen, at)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.flush()  # which raises what its thread has met; `close` does not
        self._writer.close()


def _say_unless_tensorboard(args: Any) -> None:
    """What a thread prints of its end; TensorBoard's says it to whoever calls its writer next."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
