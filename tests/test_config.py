"""Typed configs: what loads, and the sentence a user reads for each mistake."""

import importlib
from dataclasses import dataclass
from typing import get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldt import config
from ldt.cli import COMMANDS
from ldt.commands.evaluate import EvaluateJob
from ldt.commands.report import ReportJob
from ldt.commands.sample import SampleJob
from ldt.config_fields import choice, required_path_field, section
from ldt.encoding.config import EncodeJob
from ldt.errors import InputError
from ldt.submit import SubmitJob, plan
from ldt.training.config import TrainJob


@dataclass
class Net:
    width: int = 64
    kind: str = choice("plain", "gated")


@dataclass
class Schema:
    run_dir: str = required_path_field()
    net: Net = section(Net)
    betas: tuple[float, float] = (0.9, 0.99)
    flag: bool = False


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: a\nnet: {width: 128}\nbetas: [0.8, 0.9]\n")
    loaded = config.load(Schema, path, ["net.width=32", "flag=true"])
    assert loaded == Schema(run_dir="a", net=Net(width=32), betas=(0.8, 0.9), flag=True)


def test_saved_config_loads_again_unchanged(tmp_path):
    path = tmp_path / "c.yaml"
    original = Schema(run_dir="x", net=Net(kind="gated"))
    path.write_text(config.to_yaml(original))
    assert config.load(Schema, path) == original
    assert config.from_dict(Schema, config.to_dict(original)) == original


@pytest.mark.parametrize("text", ["010", "000000006400", "1e3", "no", "1_000", "2026-11-23", "a: b", "[", "ü\\"])
def test_a_text_is_taken_as_it_was_written(text):
    """`evaluate.checkpoint=000000006400` is the name of a directory, not the octal number 3328."""
    assert config.load(Schema, None, [f"run_dir={text}", "net.width=010"]).run_dir == text
    assert config.load(Schema, None, [f"run_dir='{text}'"]).run_dir == text
    assert config.load(Schema, None, ["run_dir=x"], {"run_dir": f"[{text}: ="}).run_dir == f"[{text}: ="


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_dir=a", "net.widht=3"], "unknown key net.widht in the command line; did you mean net.width"),
        (["dir=a"], "unknown key dir in the command line; did you mean run_dir?"),
        (["run_dir=a", "nett.width=3"], "unknown key nett in the command line; did you mean net"),
        (["run_dir=a", "zzz=3"], "unknown key zzz in the command line; known keys here: run_dir, net, betas, flag"),
        (["net.width=3"], "run_dir is not set"),
        (["run_dir=a", "net.width=wide"], "net.width in the command line: Value 'wide'"),
        (["run_dir=a", "flag=perhaps"], "flag in the command line"),
        (["run_dir=a", "net.kind=gatde"], "net.kind=gatde is not one of plain, gated; did you mean gated"),
        (["run_dir=a", "net=3"], "net in the command line"),
        (["run_dir=a", "betas=[1]"], "betas in the command line"),
        (["run_dir"], "'run_dir' is not of the form key=value"),
        (["run_dir=x", "betas=["], "not YAML"),
    ],
)
def test_each_mistake_is_one_sentence_that_names_the_key(overrides, message):
    with pytest.raises(InputError) as caught:
        config.load(Schema, None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_this_machine_starts_no_job_after_another():
    with pytest.raises(InputError, match="evaluation=after needs a scheduler.*evaluation=watch"):
        config.load(SubmitJob, None, ["cluster=local", "evaluation=after"])


def test_the_last_site_counts():
    """As the last of every other key does; the settings of the first are not left behind."""
    job, _ = plan(["configs/debug.yaml", "cluster=configs/cluster/example.yaml", "cluster=local"])
    assert (job.cluster, job.slurm, job.tasks) == ("local", {}, SubmitJob().tasks)
    job, _ = plan(["configs/debug.yaml", "cluster=local", "cluster=configs/cluster/example.yaml"])
    assert job.slurm["partition"] == "a100"


@pytest.mark.parametrize("sizes", ["images.size={}", "images.buckets=[64x64,{}x64]", "images.buckets=[64x64,64x{}]"])
def test_images_of_no_size_that_fits_anywhere_are_refused(sizes):
    paths = ["images.path=a", "output=b", "autoencoder=c"]
    config.load(EncodeJob, None, [*paths, sizes.format(16384)])
    with pytest.raises(InputError, match="a side of 16385 pixels, in images.size or images.buckets, is more than 16,3"):
        config.load(EncodeJob, None, [*paths, sizes.format(16385)])


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not readable as YAML"), ("- 1\n- 2", "must hold `key: value` lines"), ("net: 3", "net in ")],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        config.load(Schema, path, ["run_dir=x"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


SCHEMAS = (TrainJob, EncodeJob, EvaluateJob, SampleJob, ReportJob, SubmitJob)
KEYS = [key for schema in SCHEMAS for key, _ in config._types(schema)]
keys = st.sampled_from(KEYS) | st.text(max_size=5)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["???", "${run_dir}", "${oc.env:HOME}", "1e5", "~", "[", "{a: b}", ".inf", "=", "- a"])
)  # fmt: skip
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys | st.integers(), t, max_size=3))
# the same examples on every machine: what CI says does not depend on luck
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def loads_or_says_why(schema, path, overrides):
    try:
        loaded = config.load(schema, path, overrides)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert config.to_yaml(config.from_dict(schema, config.to_dict(loaded))) == config.to_yaml(loaded)


JOBS = {name: getattr(importlib.import_module(f"ldt.commands.{c.module}"), c.job) for name, c in COMMANDS.items()}


@pytest.mark.parametrize("name", JOBS)
def test_every_number_is_finite(name):
    """NaN is neither below nor above any bound: it would pass all other checks, and training or sampling use it."""
    for key, kind in config._types(JOBS[name]):
        if "float" in str(kind) and get_origin(kind) is not dict:
            value = "[nan, 0.5]" if get_origin(kind) else "nan"
            with pytest.raises(InputError, match=rf"^{key}=.* is not a finite number; give one$"):
                config.load(JOBS[name], None, [f"{key}={value}"])


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "train: {bad_steps: 2}\ndata: {}\ntrain:\n  global_batch: 8\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    """YAML takes the last: a whole section was lost without a word."""
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(InputError, match="twice.yaml is not readable as YAML: (seed|train) stands there twice"):
        config.load(TrainJob, tmp_path / "twice.yaml", ["run_dir=x", "data.path=y"])


@pytest.mark.parametrize(("job", "key"), [("train", "run_dir"), ("export", "to"), ("score", "reference")])
def test_a_path_that_is_needed_is_not_empty(job, key):
    with pytest.raises(InputError, match=f"{key}= is empty; give a path"):
        config.load(JOBS[job], None, [f"{key}="])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.betas=[1.0, 0.9]", r"betas=\[1.0, 0.9\] must be at least 0 and below 1"),
        ("optimizer.eps=-1", "eps=-1.0 must not be negative"),
        ("optimizer.weight_decay=-1", "weight_decay=-1.0 must not be negative"),
        ("optimizer.final_lr=-1e-4", "final_lr=-0.0001 must not be negative"),
        ("model.mlp_ratio=-1", "mlp_ratio=-1.0 must be positive"),
    ],
)
def test_numbers_that_only_a_library_would_refuse(setting, said):
    with pytest.raises(InputError, match=said):
        config.load(TrainJob, None, ["run_dir=x", "data.path=y", setting])


@pytest.mark.parametrize("setting", ["stop_seconds=-1", "max_restarts=-1"])
def test_numbers_of_a_submission(setting):
    with pytest.raises(InputError, match="must not be negative"):
        config.load(SubmitJob, None, [setting])


@pytest.mark.parametrize("setting", ["guidance=inf", "guidance=-inf", "shift=1e400"])
def test_infinity_is_no_number_either(setting):
    with pytest.raises(InputError, match="is not a finite number"):
        config.load(SampleJob, None, [setting])


@given(st.sampled_from(SCHEMAS), st.dictionaries(keys, trees, max_size=4))
@quick
def test_any_tree_loads_or_is_refused_in_a_sentence(tmp_path_factory, schema, values):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    tree: dict = {}
    for key, value in values.items():
        put(tree, key.split("."), value)
    path.write_bytes(yaml.safe_dump(tree, allow_unicode=True).encode(errors="replace"))
    loads_or_says_why(schema, path, ["run_dir=x", "data.path=y"] if schema is TrainJob else [])


def put(tree, names, value):
    """tree[a][b] = value for names [a, b], where nothing else is in the way."""
    *parents, last = names
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            return
    tree[last] = value


@given(st.sampled_from(SCHEMAS), st.lists(st.tuples(keys, st.text(max_size=10) | scalars.map(str)), max_size=3))
@quick
def test_any_override_loads_or_is_refused_in_a_sentence(schema, items):
    loads_or_says_why(schema, None, [f"{key}={value}" for key, value in items])


@given(st.text(max_size=60).map(str.encode) | st.binary(max_size=60))
@quick
def test_any_file_loads_or_is_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    loads_or_says_why(Schema, path, [])


def test_aliases_of_aliases_are_no_config(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100000 values"):
        config.load(Schema, tmp_path / "bomb.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(InputError, match="not readable as YAML"):
        config.load(Schema, tmp_path / "deep.yaml")


def test_the_environment_is_not_filled_in(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with pytest.raises(InputError, match=r"run_dir in the command line holds \$\{…\}") as caught:
        config.load(Schema, None, ["run_dir=${oc.env:WANDB_API_KEY}"])
    assert "0123456789" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml does not exist"):
        config.load(Schema, tmp_path / "nowhere.yaml")
