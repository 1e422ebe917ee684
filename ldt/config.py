"""Typed configuration: dataclass schema ← YAML file ← `key=value` overrides.

A schema is a dataclass (of dataclasses). Every mistake is an `InputError` that names the key, what is allowed and the
nearest match. Loading changes nothing that the user wrote but the `~` of a path; `__post_init__` may only refuse.
"""

import dataclasses
import difflib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldt.config_fields import choice, section
from ldt.errors import InputError, by_reason
from ldt.paths import usable_path

__all__ = ["choice", "defaults_yaml", "from_dict", "flatten", "load", "section", "to_dict", "to_yaml"]

Schema = TypeVar("Schema")
MOST_VALUES = 100_000


def load(
    schema: type[Schema],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> Schema:
    """The schema filled from a saved config or a YAML file, then by `key=value` overrides, then by `given` values."""
    merged = OmegaConf.structured(schema)
    _update(merged, base or {}, schema, "the saved config")
    if path is not None:
        _update(merged, _read_yaml(Path(path)), schema, str(path))
    _update(merged, _parse_overrides(overrides, schema), schema, "the command line")
    _update(merged, given or {}, schema, "the command line")
    return _build(merged, schema)


def sweep(words: Sequence[str]) -> list[list[str]]:
    """One list of words for each combination of the values that are given as `key=a,b,c`."""
    choices = []
    for word in words:
        key, separator, value = word.partition("=")
        choices.append([f"{key}={v}" for v in _split(value)] if separator else [word])
    return [list(combination) for combination in itertools.product(*choices)]


def _split(value: str) -> list[str]:
    """Split at commas that are in no brackets."""
    parts, depth = [""], 0
    for character in value:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _update(merged: DictConfig, values: dict[str, Any], schema: type, where: str) -> None:
    for key, value in flatten(values).items():
        if "${" in str(value):  # OmegaConf would fill in environment variables, and they would be saved with the run
            raise InputError(f"{key} in {where} holds ${{…}}, which is not filled in; write the value itself")
        try:
            merged.merge_with(_nested(key, value))  # makes sections with names of the user's too
        except OmegaConfBaseException as error:
            raise InputError(_explain(error, key, schema, where)) from None
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:  # of keys like `a[` and ``
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{key} in {where} can't be set to {repr(value)[:60]} ({reason}); see --help") from None


def _build(merged: DictConfig, schema: type[Schema]) -> Schema:
    _settle_paths(merged, schema)
    _check_finite(OmegaConf.to_container(merged))
    try:
        built = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set; give it in the config or as {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise InputError(f"the config can't be used: {str(error.msg or error).splitlines()[0]}") from None
    _check_choices(built)
    assert isinstance(built, schema)
    return built


def _check_finite(values: Any) -> None:
    """Refuse numbers that compare with nothing, which no other check would find."""
    for key, value in flatten(values).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{key}={value} is not a finite number; give one")


def _settle_paths(merged: DictConfig, schema: type, prefix: str = "") -> None:
    """Check every path that was given, and expand its `~`. Defaults stay as they are: they are saved with a run."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if OmegaConf.is_missing(merged, field.name):
            continue
        key, value, factory = prefix + field.name, merged[field.name], field.default_factory
        if field.default == MISSING and value == "":
            raise InputError(f"{key}= is empty; give a path")
        if "path" in field.metadata and value != field.default:
            remote = field.metadata["path"]
            settled = [usable_path(key, v, remote) for v in value] if field.default is dataclasses.MISSING else None
            merged[field.name] = usable_path(key, value, remote) if settled is None else settled
        elif dataclasses.is_dataclass(factory) and isinstance(factory, type):
            _settle_paths(value, factory, f"{key}.")
        elif named := _section_named_by_user(hints[field.name]):
            for name in value:
                _settle_paths(value[name], named, f"{key}.{name}.")


def _section_named_by_user(hint: Any) -> type | None:
    """The schema of the values of a mapping whose keys are the user's."""
    return next((t for t in get_args(hint) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def to_dict(config: Any) -> dict[str, Any]:
    """The whole config as plain dicts, lists, numbers and strings."""
    out = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(out, dict)
    return {str(k): v for k, v in out.items()}


def to_yaml(config: Any) -> str:
    """The whole config as YAML, in the order of the schema."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def defaults_yaml(schema: type) -> str:
    """The schema's keys with their defaults as YAML; `???` marks what must be given."""
    return OmegaConf.to_yaml(OmegaConf.structured(schema))


def from_dict(schema: type[Schema], values: dict[str, Any], where: str = "the saved config") -> Schema:
    """The inverse of `to_dict`; refuses unknown keys and wrong types like `load`. where: for messages."""
    merged = OmegaConf.structured(schema)
    _update(merged, values, schema, where)
    return _build(merged, schema)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level of dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= flatten(value, name + ".") if isinstance(value, dict) and value else {name: value}
    return out


def _nested(key: str, value: Any) -> dict[str, Any]:
    """The inverse of `flatten` for one key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section: YAML would take the last, and a whole section would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"config {path} does not exist; give the path of a YAML file, such as configs/fashion_mnist.yaml"
        )
    try:
        content = _OnceLoader(path.read_text()).get_single_data()
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise by_reason(f"config {path} is not readable as YAML: {' '.join(str(error).split())}", error) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"config {path} must hold `key: value` lines, not a {type(content).__name__}")
    if _size(content) > MOST_VALUES:  # aliases of aliases can stand for more than any memory holds
        raise InputError(f"config {path} holds more than {MOST_VALUES} values; give a smaller file")
    return content


def _size(value: Any) -> int:
    """How many values a tree holds, counted up to `MOST_VALUES`."""
    total = 1
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        total += _size(inner)
        if total > MOST_VALUES:
            break
    return total


def _parse_overrides(overrides: Sequence[str], schema: type) -> dict[str, Any]:
    items = []
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise InputError(f"argument {item!r} is not of the form key=value")
        quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
        if not quoted and dict(_types(schema, like=key)).get(key) is str:  # YAML takes 010 for 8 and no for a bool
            item = f"{key}={json.dumps(text, ensure_ascii=False)}"
        items.append(item)
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"arguments {list(overrides)} hold a value that is not YAML: {reason}") from None
    assert isinstance(parsed, dict)
    return {str(k): v for k, v in parsed.items()}


def _explain(error: OmegaConfBaseException, key: str, schema: type, where: str) -> str:
    known = [k for k, _ in _types(schema, like=key)]
    if not key.isprintable():
        return f"unknown key {key!r} in {where}; known keys: {', '.join(k for k in known if '.' not in k)}"
    if key in known:
        return f"{key} in {where}: {str(error.msg or error).splitlines()[0]}"
    parent = key.rpartition(".")[0]
    while parent and parent not in known:  # the first part that is wrong is the one to name
        key, parent = parent, parent.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    word = key.rpartition(".")[2]  # `batch` is a part of both global_batch and micro_batch
    near = [k for k in siblings if word in k.rpartition(".")[2].split("_")]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known keys here: {', '.join(siblings)}"
    return f"unknown key {key} in {where}; {hint}"


def _types(schema: type, prefix: str = "", like: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a schema, sections included, and its type; of sections named by the user, that in `like`."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, factory = prefix + field.name, field.default_factory
        yield key, hints[field.name]
        if dataclasses.is_dataclass(factory) and isinstance(factory, type):
            yield from _types(factory, f"{key}.", like)
        named = _section_named_by_user(hints[field.name])
        if named is not None and like.startswith(f"{key}."):
            name = like.removeprefix(f"{key}.").partition(".")[0]
            yield f"{key}.{name}", named
            yield from _types(named, f"{key}.{name}.", like)


def _check_choices(config: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{field.name}.")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {near[0]}?" if near else "choose one of these"
            raise InputError(f"{prefix}{field.name}={value} is not one of {', '.join(choices)}; {hint}")
