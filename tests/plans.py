"""What `ldt plan` computes of a config, without its words."""

import functools
from pathlib import Path

from ldt.commands import plan
from ldt.config import load

ROOT = Path(__file__).parents[1]


@functools.cache
def measured(path):
    return plan.measure(load(plan.PlanJob, path, ()))


def planned(path, *settings, stage=None):
    config = load(plan.PlanJob, path, settings)
    model = plan.measure(config) if any(s.startswith("latent=") for s in settings) else measured(path)
    stage = config.engine.zero_stage if stage is None else stage
    return config, model, plan.place(config, model, config.nodes, stage)
