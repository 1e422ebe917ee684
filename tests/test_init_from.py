"""What is said of weights that a run starts from: what differs, what can't be taken, when they are not read at all."""

from dataclasses import replace

import forked
import numpy as np
import pytest
from shard_data import write_shards

from ldt.data.latent_spec import pack_statistics
from ldt.data.shards import open_shards
from ldt.training.setup import describe_constant

SETTINGS = ["seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "log.every_samples=8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("root")
    write_shards(path / "data", [40, 23])
    assert train(path, "first", 8).returncode == 0
    return path


def train(root, name, samples, *settings):
    words = [*SETTINGS, f"run_dir={root}/{name}", f"data.path={root}/data", f"train.total_samples={samples}", *settings]
    return forked.run("-m", "ldt", "train", *words)


def test_another_objective_and_checkpoints_of_its_own_are_said(root):
    begun = train(root, "second", 8, f"train.init_from={root}/first", "objective.condition_drop=0.2")
    assert begun.returncode == 0, begun.stderr
    assert "were trained with objective.condition_drop=0.1, and go on here with 0.2" in begun.stderr
    assert begun.stderr.count("were trained with objective.") == 1 and "is not read" not in begun.stderr
    resumed = train(root, "second", 16, f"train.init_from={root}/first", "objective.condition_drop=0.2")
    assert "is not read: the run has checkpoints of its own" in resumed.stderr
    assert "were trained with" not in resumed.stderr


def test_a_refusal_advises_what_can_help(root):
    refused = train(root, "third", 8, f"train.init_from={root}/first", "model.width=64")
    assert refused.returncode == 2 and "set model.* as there" in refused.stderr and "run_dir" not in refused.stderr


def test_a_channel_that_never_changes_is_said(root):
    spec = open_shards(root / "data").manifest.spec
    assert list(describe_constant(spec)) == []
    (line,) = describe_constant(replace(spec, std_C=[1.0, 3e-9, 1.0, 0.0]))
    assert "never change in channel 1, 3 " in line


def test_an_element_that_never_changes_is_said_where_elements_are_whitened(root):
    """The deviation of its channel may be large: elements differ from each other."""
    spec = open_shards(root / "data").manifest.spec
    std_CHW = np.full(spec.latent_shape, 2.0)

    def lines() -> list[str]:
        by_element = {"mean_CHW": pack_statistics(np.zeros_like(std_CHW)), "std_CHW": pack_statistics(std_CHW)}
        return list(describe_constant(replace(spec, **by_element)))

    assert lines() == []
    std_CHW[1, 0, 1] = 3e-9
    (line,) = lines()
    assert f"never change in 1 of {std_CHW.size} elements, the first [1, 0, 1] " in line
    std_CHW[2] = 0.0
    (line,) = lines()
    assert "never change in channel 2 " in line
