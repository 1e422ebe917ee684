"""A run for jobs on a cluster, and the same run without any scheduler to compare it with."""

from pathlib import Path

import forked
import pytest
from cluster import ROOT, outcome
from shard_data import write_shards

from ldt.log import read_jsonl

CONFIG = """
seed: 3
data: {{path: {root}/data}}
model: {{width: 48, depth: 2, heads: 2}}
train: {{global_batch: 8, total_samples: 1200}}
optimizer: {{lr: 1e-3}}
log: {{every_samples: 8}}
checkpoint: {{every_samples: 80}}
engine: {{stall_seconds: 60}}
run_dir: {root}/run
"""


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The same run on one process without any scheduler: its training lines."""
    root = tmp_path_factory.mktemp("plain")
    write_config(root)
    done = forked.run("-m", "ldt", "train", root / "config.yaml", "--quiet", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return training_lines(root / "run")


def write_config(root: Path) -> Path:
    write_shards(root / "data", [40, 23, 30])
    (root / "config.yaml").write_text(CONFIG.format(root=root))
    return root / "config.yaml"


def training_lines(run_dir: Path) -> list[dict]:
    return [r for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r]


def check_same_run(run_dir: Path, plain: list[dict]) -> list[dict]:
    """Digests throughout and the first 50 losses to 5 digits are those of the plain run; returns the lines."""
    lines = training_lines(run_dir)
    assert [r["digest"] for r in lines] == [r["digest"] for r in plain]
    assert [r["loss"] for r in lines[:50]] == pytest.approx([r["loss"] for r in plain[:50]], rel=1e-5)
    assert outcome(run_dir)["outcome"] == "done"
    return lines
