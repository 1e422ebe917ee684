"""One start of a training: who owns the run directory meanwhile, and what is told of how it ended."""

from pathlib import Path

from ldt import log, rng
from ldt.dist import World, on_rank_zero
from ldt.errors import InputError, RunError, in_a_sentence
from ldt.run import outcome
from ldt.run.outcome import FAILED, WRONG_INPUT
from ldt.run.owner import owned
from ldt.run.preflight import check_shared, check_writable
from ldt.run.watchdog import Watchdog
from ldt.training.config import TrainJob
from ldt.training.trainer import Trainer

logger = log.get_logger(__name__)


def attempt(config: TrainJob, world: World, until: int = 0, rng_version: int = rng.VERSION) -> tuple[int, str, int]:
    """One attempt inside of a process group: exit code, what happened, samples seen. outcome.json says the same.

    until: stop there as if it were the end, with the rates of the whole run; 0 for `train.total_samples`. rng_version:
    the random numbers of a new run.
    """
    run_dir = Path(config.run_dir)
    with owned(run_dir, world) as owner:
        before, trainer = on_rank_zero(world, lambda: outcome.begin(run_dir)), None

        def note_stall(summary: str) -> None:
            outcome.write_outcome(run_dir, FAILED, trainer.state.samples_seen if trainer else None, summary)

        try:
            with in_a_sentence():
                check_shared(run_dir, world)
                check_writable(run_dir, world)
                with Watchdog(run_dir / "stalls", config.engine.stall_seconds, world, note_stall) as watchdog:
                    trainer = Trainer(config, world, owner, watchdog, until, rng_version)
                    code, message, seen = trainer.train()
        except BaseException as error:
            if trainer is None and isinstance(error, InputError):  # refused: the run stays as it was
                if world.rank == 0:
                    outcome.take_back(run_dir, before)
                raise
            code = WRONG_INPUT if isinstance(error, InputError) else FAILED
            words = str(error) if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {error}"
            try:
                outcome.write_outcome(run_dir, code, message=words)
            except (InputError, RunError) as unwritten:  # on a full disk, say: what has happened comes first
                logger.error("%s", unwritten)
            raise
        if world.rank == 0:
            outcome.write_outcome(run_dir, code, seen, message)
    return code, message, seen
