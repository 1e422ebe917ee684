"""The ldt command: help that teaches, arguments, exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml
from shard_data import write_shards

from ldt import cli
from ldt.run.outcome import DONE, WRONG_INPUT

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


@pytest.mark.parametrize("name", ["runs/optimizer.lr=1e-3,model={width: 48}", "optimizer.lr=1e-3", "010", "no"])
def test_a_run_may_be_called_anything(tmp_path, capsys, monkeypatch, name):
    """A sweep's runs are called after their keys, and what YAML takes for a number or a bool is a name all the same."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.yaml").write_text("evaluate: {steps: 7}\n")
    for command in ("evaluate", "sample", "status", "report", "inspect"):
        assert cli.main([command, name, "--dry-run"]) == DONE
        shown = yaml.safe_load(capsys.readouterr().out)
        assert name in (shown.get("run"), shown.get("path"), *shown.get("runs", [])), command
        assert command != "evaluate" or shown["evaluate"]["steps"] == 7
    assert cli.main(["train", f"run_dir={name}", "data.path=y", "--dry-run"]) == DONE
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == name


def test_a_setting_may_be_long(capsys):
    assert cli.main(["sample", "run", f"prompts=[{'a long caption ' * 40}]", "--dry-run"]) == DONE


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
        (["train", "configs/debug.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["train"], "usage: ldt train CONFIG [key=value ...]; ldt train --help lists the keys"),
        (["report"], "usage: ldt report RUN [RUN ...]"),
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "a.yaml", "b.yaml"], "one config at a time"),
        (["train", "stray"], "'stray' is neither a .yaml file nor key=value"),
        (["train", "runs/lr=1"], "'runs/lr=1' is neither a .yaml file nor key=value"),
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
    done = forked.run("-m", "ldt", "train", f"run_dir={tmp_path}/run", TINY, "train.global_batch=8", *settings)
    assert done.returncode == WRONG_INPUT, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lost_rank_is_a_sentence_of_those_that_are_left(data, tmp_path):
    """And of outcome.json: eight tracebacks of 50 lines each said nothing more."""
    run_dir = tmp_path / "run"
    settings = ["train.global_batch=8", "train.total_samples=8000000", "log.every_samples=8", f"data.path={data}"]
    ranks = forked.start_ranks(2, "-m", "ldt", "train", f"run_dir={run_dir}", TINY, *settings)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and ranks[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].kill()
    done = ranks[0].finish(timeout=120)
    assert done.returncode == 1, done.stderr
    assert "ldt train: failed: another rank is gone" in done.stderr and "Traceback" not in done.stderr
    assert "another rank is gone" in json.loads((run_dir / "outcome.json").read_text())["message"]


def test_a_reader_that_has_seen_enough_is_no_error():
    """`ldt train --help | head -1`: more than a pipe's buffer of text, and nobody there."""
    code = "import sys; from ldt.cli import main; sys.stdout.reconfigure(line_buffering=True); sys.exit(main())"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code, "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_under_a_launcher_the_dry_run_is_printed_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "run_dir=x", "data.path=y", "--dry-run"]) == DONE
        said.append(capsys.readouterr().out)
    assert "run_dir: x" in said[0] and said[1] == ""


SLOW = {"torch", "torch._dynamo", "deepspeed", "diffusers", "wandb"}
WITHOUT_TORCH = ("status", "verdict")
IMPORTS = """
import importlib, os, sys
importlib.import_module(sys.argv[1])
for module in sys.argv[2:]:
    if os.fork() == 0:
        importlib.import_module("ldt.cli"), importlib.import_module(f"ldt.commands.{module}")
        print(module, *sys.modules, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported():
    """The slow libraries that each command's module imports, in forks of an interpreter with no more than it may."""
    found = {}
    for may, commands in (("sys", WITHOUT_TORCH), ("torch", set(cli.COMMANDS) - set(WITHOUT_TORCH))):
        words = [sys.executable, "-c", IMPORTS, may, *(cli.COMMANDS[command].module for command in commands)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found |= {name: SLOW & set(modules) for name, *modules in map(str.split, done.stdout.splitlines())}
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_imports_no_slow_library_that_it_may_not_need(imported, command):
    """Job scripts pay for torch, which takes seconds, and every start for the compiler and the other libraries."""
    assert imported[cli.COMMANDS[command].module] <= (set() if command in WITHOUT_TORCH else {"torch"})


TRAIN = """
import os, sys
import torch
from ldt.cli import main
for i, settings in enumerate((["engine.precision=fp32"], ["engine.precision=bf16", "engine.zero_stage=1"])):
    if os.fork() == 0:
        assert main(["train", *sys.argv[2:], f"run_dir={sys.argv[1]}/{i}", "--quiet", *settings]) == 0
        os.write(1, " ".join(["modules", *sys.modules, "\\n"]).encode())
        os._exit(0)
    os.wait()
"""


def test_a_training_imports_no_compiler_that_it_does_not_ask_for(tmp_path):
    """Torch's optimizers and DeepSpeed's Muon, for which ZeRO asks, would import it, at 2 CPU seconds a rank."""
    write_shards(tmp_path / "data", [16])
    words = [f"data.path={tmp_path}/data", "model={width: 32, depth: 1, heads: 2}"]
    words += ["train.global_batch=8", "train.total_samples=16"]
    done = subprocess.run([sys.executable, "-c", TRAIN, tmp_path, *words], capture_output=True, text=True, check=True)
    imported = [SLOW & set(line.split()) for line in done.stdout.splitlines() if line.startswith("modules")]
    assert imported == [{"torch", "deepspeed"}] * 2


def test_names_in_any_encoding_can_be_said(tmp_path):
    """Where the output can't hold them, their characters are escaped; an argument that is no text is refused."""
    write_shards(tmp_path / "Käse", [3], classes=("Käse", "two\nlines", "c"))
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ldt", "inspect"]
    done = subprocess.run([*command, tmp_path / "Käse"], env=ascii, capture_output=True, text=True)
    assert done.returncode == 0 and f"whole: {tmp_path}/K\\xe4se\n" in done.stdout, done.stderr
    assert "two\\nlines" in done.stdout
    done = subprocess.run([*command, os.fsencode(tmp_path) + b"/\xe9t\xe9"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "/\\udce9t\\udce9 is not text in UTF-8; give the file or directory another name" in done.stderr
