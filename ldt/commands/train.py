"""Train a denoiser on latent shards, or resume where it stopped."""

from pathlib import Path

from ldt import log
from ldt.cluster.gpus import choose_arithmetic
from ldt.config import to_yaml
from ldt.dist import RENDEZVOUS_TIMEOUT_S, SLOWEST_RANK_TIMEOUT, process_group
from ldt.run import directory, stop
from ldt.run.preflight import compare_ranks
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob
from ldt.training.monitor import peak_memory

__all__ = ["TrainJob", "run"]

logger = log.get_logger(__name__)

ASKED_TIMEOUT_S = 5.0  # for the other ranks to come, when this one has been asked to stop: they may be gone


def run(config: TrainJob) -> int:
    """Train until `train.total_samples` or until asked to stop; returns the exit code."""
    run_dir = Path(config.run_dir)
    choose_arithmetic(config.engine.deterministic)  # before CUDA starts; the engine asks for TF32
    patience = ASKED_TIMEOUT_S if stop.was_asked() else RENDEZVOUS_TIMEOUT_S
    with process_group(patience, SLOWEST_RANK_TIMEOUT) as world:
        compare_ranks(to_yaml(config), world)
        code, message, seen = attempt(config, world)
        if world.rank == 0:
            memory = peak_memory(world.device) / 1e9
            logger.info("written: %s; peak memory of a process %.1f GB", directory.what_is_there(run_dir), memory)
            logger.info("next: ldt sample %s; ldt evaluate %s; ldt report %s", run_dir, run_dir, run_dir)
            print(f"{message} at {seen:,} samples: {run_dir}")
    return code
