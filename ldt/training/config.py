"""The keys of a training run."""

import math
import re
from dataclasses import dataclass, field

from ldt.config_fields import check_seed, path_field, required_path_field, section
from ldt.diffusion.config import ObjectiveConfig
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig
from ldt.nn.config import ModelConfig
from ldt.sampling.config import ImageConfig


@dataclass
class SourceConfig:
    """One of several data sets: its `path`, and its `weight` beside those of the others."""

    path: str = required_path_field(remote=True)
    weight: float = 1.0


@dataclass
class DataConfig:
    """`path` holds shards and a manifest (`ldt encode`); `streams` and `window` shape the shuffle (docs/data.md).

    `sources`, instead of `path`: several such directories by name, mixed by their weights.
    A remote `path` (`s3://…`) is read through `cache_dir` on each node, of at most `cache_gb` (10⁹ bytes).
    """

    path: str = path_field(remote=True)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    cache_dir: str = path_field()
    cache_gb: float = 100.0
    streams: int = 16
    window: int = 65536
    threads: int = 2


@dataclass
class TrainConfig:
    """`micro_batch` is the most samples a rank sends through the network at once; 0 for all its share, `auto` for as
    many as its memory holds (or engine.activation_memory_gb).

    A step whose loss or gradient is not finite is skipped, with `spike_factor` also one whose loss lies that many
    robust standard deviations above the recent median; `bad_steps` of them in a row roll the run back once.
    `init_from`: a run, checkpoint, exported or imported model whose weights the run starts with (docs/own_data.md,
    "Fine-tuning"); `init_fresh`: parameters or modules that are not taken from it; `init_resize`: learned positions and
    the class table, taken as far as they fit. `time_limit_minutes`: stop with a checkpoint then, to be started again.
    `accept_changes`: keys of the config that may differ from the run's checkpoint though they define it.
    """

    global_batch: int = 256
    total_samples: int = 1_000_000
    micro_batch: int | str = 0
    init_from: str = path_field()
    init_fresh: list[str] = field(default_factory=list)
    init_resize: list[str] = field(default_factory=list)
    bad_steps: int = 3
    spike_factor: float = 0.0
    time_limit_minutes: float = 0.0
    accept_changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(f"train.global_batch={self.global_batch} must be at least 1")
        if self.total_samples < self.global_batch:
            raise InputError(f"train.total_samples={self.total_samples} is less than one global batch")
        automatic = self.micro_batch == "auto"
        if not automatic and (isinstance(self.micro_batch, str) or self.micro_batch < 0):
            raise InputError(
                f"train.micro_batch={self.micro_batch} must be positive, 0 for the rank's whole share, or auto"
            )
        if self.bad_steps < 1:
            raise InputError(f"train.bad_steps={self.bad_steps} must be at least 1")
        for key in ("init_fresh", "init_resize"):
            if getattr(self, key) and not self.init_from:
                raise InputError(f"train.{key}={getattr(self, key)} belongs to train.init_from, which is not set")
        if self.spike_factor < 0:
            raise InputError(f"train.spike_factor={self.spike_factor} must be positive, such as 20, or 0 for off")
        if self.time_limit_minutes < 0:
            raise InputError(f"train.time_limit_minutes={self.time_limit_minutes} must be positive, or 0 for none")


@dataclass
class AlignConfig:
    """Alignment of the tokens after `block` blocks with the targets in the shards (`ldt encode target=NAME`).

    `weight`: of the distance beside the loss (0: off; 0.5 in REPA). It counts for the first `until_samples` samples of
    the run alone, 0 for all. `token_weight` (0: off; 0.03 in REG, 2507.01467): of the loss of a class token, the
    target's mean over patches, that is denoised beside the image, in training for the whole run and in sampling.
    """

    weight: float = 0.0
    block: int = 0
    until_samples: int = 0
    token_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InputError(f"align.weight={self.weight} must be positive, such as 0.5, or 0 for off")
        if not 0 <= self.token_weight < math.inf:
            raise InputError(f"align.token_weight={self.token_weight} must be positive, such as 0.03, or 0 for off")
        if self.until_samples < 0:
            raise InputError(f"align.until_samples={self.until_samples} must be a number of samples, or 0 for all")


@dataclass
class CheckpointConfig:
    """Save every so many samples (0: only at the end); keep the newest ones and one every `keep_every_samples`."""

    every_samples: int = 0
    keep: int = 2
    keep_every_samples: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError(f"checkpoint.keep={self.keep} must be at least 1")


@dataclass
class LogConfig:
    """Everything in samples; 0 turns validation and sample grids off. `preview`: how those grids are drawn.

    `validation_times`: 0 for the objective's own loss at its own times; K for the velocity's at K fixed times, sample i
    at (i mod K)/K, which compares objectives (8: MLPerf's).
    `wandb`, `tensorboard`: mirrors of metrics.jsonl, which is always written first.
    """

    every_samples: int = 10_000
    validation_every_samples: int = 0
    validation_times: int = 0
    samples_every_samples: int = 0
    preview: ImageConfig = section(ImageConfig)
    wandb: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.validation_times < 0 or self.validation_times == 1:
            raise InputError(
                f"log.validation_times={self.validation_times} must be at least 2, such as 8, or 0 for the objective's "
                "own times"
            )


@dataclass
class TrainJob:
    """A training run."""

    run_dir: str = required_path_field()
    seed: int = 0
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    align: AlignConfig = section(AlignConfig)
    train: TrainConfig = section(TrainConfig)
    engine: EngineConfig = section(EngineConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    ema: EMAConfig = section(EMAConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        path, sources = self.data.path, self.data.sources
        if not path and not sources:
            raise InputError(
                "data.path is not set; give it in the config or as data.path=VALUE, or give several data.sources"
            )
        if path and sources:
            raise InputError(
                f"data.path={path} and data.sources ({', '.join(sources)}) are both given; leave one of them out"
            )
        self._check_mean_flow()
        depth = self.model.depth if self.model.name == "transformer" else 0
        if self.align.weight and not 1 <= self.align.block <= depth:
            raise InputError(
                f"align.weight={self.align.weight} needs align.block={self.align.block} to be the number of a "
                f"transformer's block, from 1 to model.depth={self.model.depth}"
            )
        if self.align.token_weight and (self.model.name != "transformer" or self.objective.mean_flow):
            raise InputError(
                f"align.token_weight={self.align.token_weight} is for a transformer's loss at one time; it needs "
                "model.name=transformer and objective.mean_flow=0"
            )
        for name, source in sources.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise InputError(f"data.sources has the name {name!r}; use letters, digits, - and _")
            if not 0 < source.weight < math.inf:
                raise InputError(f"data.sources.{name}.weight={source.weight} must be a number above 0")

    def _check_mean_flow(self) -> None:
        """Its key in the model, and an engine that has the whole weights at hand."""
        share = self.objective.mean_flow
        if share and not self.model.interval:
            raise InputError(
                f"objective.mean_flow={share} needs a model that is told of intervals; set model.interval=true"
            )
        if share and self.engine.zero_stage == 3:
            raise InputError(
                f"objective.mean_flow={share} needs the whole weights on every rank for its derivative; use "
                "engine.zero_stage=0, 1 or 2"
            )
        if self.log.preview.sampler == "mean_flow" and not self.model.interval:
            raise InputError("log.preview.sampler=mean_flow needs model.interval=true and objective.mean_flow above 0")
