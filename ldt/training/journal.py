"""What a run writes down of its steps: lines of metrics.jsonl, and their mirrors."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from ldt import log
from ldt.checkpoint.manifest import TrainState
from ldt.data.digest import digest_text
from ldt.dist import World
from ldt.engine.engine import StepResult
from ldt.tracking import Tracking
from ldt.training.monitor import Meter, peak_memory

logger = log.get_logger(__name__)


class Journal:
    """Lines of one attempt; each is stamped with the clock and the number of the attempt in the state it is given."""

    def __init__(self, run_dir: Path, world: World, mirrors: Tracking) -> None:
        self.meter, self._path, self._world, self._mirrors = Meter(), run_dir / "metrics.jsonl", world, mirrors

    def step(self, state: TrainState, result: StepResult, lr: float, digest: int, bucket: str) -> None:
        """Note a step that changed the weights, and the speed since the last one that was noted."""
        rate, wait_fraction = self.meter.read()
        self.write(
            state,
            loss=float(np.float32(result.loss)),
            lr=lr,
            grad_norm=result.grad_norm,
            images_per_second=rate,
            world_size=self._world.size,
            data_wait_fraction=wait_fraction,
            digest=digest_text(digest),
            peak_memory=peak_memory(self._world.device),
            **({"bucket": bucket} if bucket else {}),
        )

    def skipped_step(self, state: TrainState, positions: range, result: StepResult, digest: int, reason: str) -> None:
        """Note a step that changed no weights."""
        self.write(
            state,
            skipped_first=positions[0],
            skipped_last=positions[-1],
            reason=reason,
            skipped_loss=result.loss if math.isfinite(result.loss) else None,
            skipped_grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            digest=digest_text(digest),
        )
        logger.warning("skipped positions %d to %d: %s", positions[0], positions[-1], reason)

    def write(self, state: TrainState, **facts: Any) -> None:
        """Add a line to metrics.jsonl, then to its mirrors."""
        stamp = {"time": time.time(), "attempt": state.attempt}
        record = {"samples_seen": state.samples_seen, **facts, **stamp}
        if self._world.rank == 0:
            log.append_jsonl(self._path, record)
            self._mirrors.log(record)
