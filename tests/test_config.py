"""Typed configs: what loads, and the sentence a user reads for each mistake."""

from dataclasses import dataclass

import pytest

from ldt import config
from ldt.errors import InputError
from ldt.options import choice, required, section


@dataclass
class Net:
    width: int = 64
    kind: str = choice("plain", "gated")


@dataclass
class Schema:
    run_dir: str = required()
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_dir=a", "net.widht=3"], "unknown key net.widht in the command line; did you mean net.width"),
        (["run_dir=a", "nett.width=3"], "unknown key nett in the command line; did you mean net"),
        (["run_dir=a", "zzz=3"], "unknown key zzz in the command line; known keys here: run_dir, net, betas, flag"),
        (["net.width=3"], "run_dir is not set"),
        (["run_dir=a", "net.width=wide"], "net.width in the command line: Value 'wide'"),
        (["run_dir=a", "flag=perhaps"], "flag in the command line"),
        (["run_dir=a", "net.kind=gatde"], "net.kind=gatde is not one of plain, gated; did you mean gated"),
        (["run_dir=a", "net=3"], "net in the command line"),
        (["run_dir=a", "betas=[1]"], "betas in the command line"),
        (["run_dir"], "'run_dir' is not of the form key=value"),
        (["run_dir=[", "flag=true"], "not YAML"),
    ],
)
def test_each_mistake_is_one_sentence_that_names_the_key(overrides, message):
    with pytest.raises(InputError) as caught:
        config.load(Schema, None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml does not exist"):
        config.load(Schema, tmp_path / "nowhere.yaml")
