"""What a path may be, for every key of every command: `~` is the home directory, an address is refused where none is
read, and nothing is ever made under a name like `s3:`."""

import dataclasses
import importlib
import typing

import pytest

from ldt import config
from ldt.cli import COMMANDS, main
from ldt.errors import InputError
from ldt.paths import usable_path
from ldt.submit import SubmitJob

NOT_PATHS = {
    "accept_changes", "buckets", "caption", "checkpoint", "classes", "cluster", "gpus", "guide_weights", "init_fresh",
    "init_resize", "label", "latent", "metrics", "micro_batch", "model", "name", "prompts", "size", "slurm", "target",
    "watch_job",
}  # fmt: skip
REMOTE = {"images.path", "data.path", "data.sources.NAME.path"}


def string_keys(schema, prefix=""):
    """(key, field) of all keys that take text and no choice of words."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        hint, factory = hints[f.name], f.default_factory
        named = next((t for t in typing.get_args(hint) if dataclasses.is_dataclass(t)), None)
        if dataclasses.is_dataclass(factory):
            yield from string_keys(factory, f"{prefix}{f.name}.")
        elif named:
            yield from string_keys(named, f"{prefix}{f.name}.NAME.")
        elif "str" in str(hint) and "Any" not in str(hint) and not f.metadata.get("choices"):
            yield prefix + f.name, f


JOBS = {n: getattr(importlib.import_module(f"ldt.commands.{c.module}"), c.job) for n, c in COMMANDS.items()}
JOBS["submit"] = SubmitJob
PATHS = [(n, k, f) for n, job in JOBS.items() for k, f in string_keys(job) if "path" in f.metadata]
ENOUGH = {
    "encode": ["images.path=x", "images.size=8", "autoencoder=x", "output=x"],
    "bench encode": ["images.path=x", "images.size=8", "autoencoder=x", "output=x"],
    "train": ["run_dir=x", "data.path=x"],
    "verdict": ["run_dir=x", "data.path=x", "launcher_code=0"],
    "plan": ["run_dir=x", "data.path=x"],
    "verify": ["run=x", "run_dir=x", "data.path=x"],
    "export": ["run=x", "to=x"],
    "import": ["weights=x", "to=x", "autoencoder=x"],
}


def setting(job, key, value):
    """Arguments of a job that are enough, and this one."""
    key = key.replace("NAME", "some")
    wanted = [
        a
        for a in ENOUGH.get(job, ["path=x"] if job in ("inspect", "bench data") else ["run=x"])
        if not a.startswith(f"{key}=")
    ]
    if key.startswith("data.sources") or key in ("index", "latents"):
        wanted = [
            a for a in wanted if not a.startswith(("data.path", "images.path", "output" if key == "index" else "-"))
        ]
    if job in ("report", "submit"):
        wanted = ["runs=[x]"] if key == "output" else []
    value = f"[{value}]" if key == "runs" else value
    fit = ["evaluate.fit=crop"] if key == "evaluate.reference" else []
    scale = [f"{key}_scale=1.5"] if key.endswith("guide") else []
    return [*wanted, f"{key}={value}", *fit, *scale]


def value_of(built, key):
    for name in key.replace("NAME", "some").split("."):
        built = built[name] if isinstance(built, dict) else getattr(built, name)
    return built[0] if isinstance(built, list) else built


def test_every_key_of_text_says_whether_it_is_a_path():
    for name, job in JOBS.items():
        for key, f in string_keys(job):
            assert ("path" in f.metadata) != (key.rpartition(".")[2] in NOT_PATHS), (name, key)
            assert f.metadata.get("path", False) == (key in REMOTE), (name, key)


@pytest.mark.parametrize(("job", "key"), [(job, key) for job, key, _ in PATHS])
def test_each_path_is_expanded_and_no_address_becomes_a_directory(job, key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    load = lambda value: config.load(JOBS[job], None, setting(job, key, value))  # noqa: E731
    assert value_of(load("~/of/mine.html"), key) == f"{tmp_path}/of/mine.html"
    assert value_of(load("plain/a=b.html"), key) == "plain/a=b.html"
    if key in REMOTE:
        assert value_of(load("s3://bucket/data"), key) == "s3://bucket/data"
    else:
        with pytest.raises(InputError, match=r"=s3://bucket/data is a remote address, and .* local disks only"):
            load("s3://bucket/data")
    with pytest.raises(InputError, match="did you mean s3://bucket/data"):
        load("s3:/bucket/data")


def test_defaults_are_saved_as_they_are():
    """A run's config is read by other users too."""
    assert config.load(JOBS["train"], None, ENOUGH["train"]).evaluate.cache_dir.startswith("~/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb", r"'a\\nb' holds a line break"),
        ("a\0b", "control character"),
        ("~nobody-of-that-name/x", "home directory of a user who is not known"),
        ("file:///x", "is a remote address"),
    ],
)
def test_what_is_no_path_is_said(text, said):
    with pytest.raises(InputError, match=said):
        usable_path("output", text)


@pytest.mark.parametrize("name", ["s3:", "a:b/c", "embedded:fashion_mnist", "stabilityai/sd-vae-ft-ema", "./s3:/x"])
def test_names_with_colons_stay(name):
    assert usable_path("autoencoder", name) == name


def test_a_run_below_the_home_directory_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["evaluate", "run=~/runs/none"]) == 2
    assert f"{tmp_path}/runs/none does not exist" in capsys.readouterr().err
    assert main(["inspect", "s3://bucket/data"]) == 2
    assert "path=s3://bucket/data is a remote address" in capsys.readouterr().err
