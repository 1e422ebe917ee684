"""The ldt command: help that teaches, arguments, exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from shard_data import write_shards

from ldt import cli
from ldt.rundir import DONE, WRONG_INPUT

ROOT = Path(__file__).parents[1]


def test_help_names_every_command_and_every_example_config_exists(capsys):
    assert cli.main(["--help"]) == DONE
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text
    for path in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_lists_its_keys(name, capsys):
    assert cli.main([name, "--help"]) == DONE
    text = capsys.readouterr().out
    assert f"usage: ldt {name}" in text
    keys = yaml.safe_load(text.split("Keys and defaults:")[1])
    assert isinstance(keys, dict) and keys


def test_dry_run_prints_the_resolved_config_and_does_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = ["--local_rank=0", "train", str(ROOT / "configs/debug.yaml"), f"run_dir={run_dir}", "--dry-run"]
    assert cli.main([*arguments, "model.width=64"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["width"] == 64 and shown["train"]["global_batch"] == 64
    assert not run_dir.exists()


@pytest.mark.parametrize("argument", ["run", "run/checkpoints/000000000064"])
def test_evaluation_starts_from_the_config_of_its_run(tmp_path, capsys, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    (tmp_path / argument).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run_dir: run\nevaluate: {images: 123, steps: 7}\n")
    assert cli.main(["evaluate", argument, "evaluate.steps=9", "--dry-run"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"] == argument
    assert (shown["evaluate"]["images"], shown["evaluate"]["steps"]) == (123, 9)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path, capsys):
    folder = path.parent.relative_to(ROOT / "configs")
    if folder.parts[:1] == ("cluster",):  # read by launch, tested with it
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        return
    command = "encode" if folder.parts[:1] == ("encode",) else "train"
    assert cli.main([command, str(path), "--dry-run"]) == DONE, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "there is no such command; the commands are encode"),
        (["train", "configs/debug.yaml", "--fast"], "unknown flag --fast"),
        (["train"], "usage: ldt train CONFIG [key=value ...]; ldt train --help lists the keys"),
        (["report"], "usage: ldt report RUN [RUN ...]"),
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "a.yaml", "b.yaml"], "one config at a time"),
        (["train", "stray"], "'stray' is neither a .yaml file nor key=value"),
        (["train", "run_dir=x"], "data.path is not set"),
        (["train", "run_dir=x", "data.path=y", "model.width=7"], "model.heads=6 does not divide model.width=7"),
        (["evaluate", "a", "b"], "one run at a time"),
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["sample", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert cli.main(arguments) == WRONG_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


TINY = "model={width: 32, depth: 1, heads: 2}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [30])
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.path=missing"], "data path missing does not exist"),
        (["data.path={data}", "model.patch=3"], "model.patch=3 does not divide the latent size 2x2"),
        (["data.path={data}", "log.validation_every_samples=8"], "has no held-out split"),
        (["data.path={data}", "log.samples_every_samples=8"], "autoencoder test can't be loaded"),
        (["data.path={data}", "run_dir=/dev/null/run"], "run_dir=/dev/null/run can't be written"),
        (["data.path={data}", "train.init_from=missing"], "missing does not exist"),
    ],
)
def test_training_on_bad_input_ends_with_2_and_one_sentence(data, tmp_path, settings, message):
    """In processes of their own: this is what a job script sees."""
    settings = [s.format(data=data) for s in settings]
    command = [sys.executable, "-m", "ldt", "train", f"run_dir={tmp_path}/run", TINY, "train.global_batch=8", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == WRONG_INPUT, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
