"""The learning rate as a function of the samples seen."""

import torch

from ldt.engine.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, samples_seen: int, total_samples: int) -> float:
    """Linear warm-up, then constant, cosine or linear decay to `final_lr` at `total_samples`."""
    if samples_seen < config.warmup_samples:
        return config.lr * samples_seen / config.warmup_samples
    if config.decay == "constant":
        return config.lr
    span = max(total_samples - config.warmup_samples, 1)
    done = min((samples_seen - config.warmup_samples) / span, 1.0)
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
    return config.final_lr + (config.lr - config.final_lr) * left
