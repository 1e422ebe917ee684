"""What a checkpoint's manifest may say: every lie is named, and what is just within the rules is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from small_checkpoints import seal, write_checkpoint

from ldt.checkpoint import manifest as manifests
from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import Damaged, TrainState, listed, read_manifest, verify_file
from ldt.checkpoint.tensors import Reader
from ldt.errors import InputError

FILE = "rank-00000-of-00001.safetensors"
W, B = torch.arange(6.0).reshape(2, 3), torch.tensor([7.0, 8.0])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """8 elements of two kinds in one file: at least 64 bytes."""
    return write_checkpoint(tmp_path / "000000000040", 40, {"master": {"w": W, "b": B}, "ema": {"w": -W, "b": -B}})


def with_file(path: Path, name: str = FILE, **changes: Any) -> dict[str, Any]:
    """`files` of the manifest with its only entry changed."""
    return {name: json.loads((path / "manifest.json").read_text())["files"][FILE] | changes}


@pytest.mark.parametrize("files", [1, 2, 3])
def test_a_checkpoint_written_by_the_specification_is_read(tmp_path: Path, files: int) -> None:
    path = write_checkpoint(tmp_path / "any-name", 40, {"master": {"w": W, "b": B}}, files)
    checkpoint = Checkpoint.read(path).verify()
    assert checkpoint.samples_seen == 40 and checkpoint.spec.classes == ["a", "b", "c"]
    full = Reader(path, checkpoint.manifest).full("master")
    assert torch.equal(full["w"], W) and torch.equal(full["b"], B)


LIES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "a file elsewhere": (lambda p: {"files": with_file(p, f"../{FILE}")}, "lies outside of the checkpoint"),
    "a range of three numbers": (
        lambda p: {"files": with_file(p, ranges={"w": [0, 6, 1], "b": [0, 2]})},
        r"holds w \[0, 6, 1\]",
    ),
    "an unknown parameter": (
        lambda p: {"files": with_file(p, ranges={"w": [0, 6], "b": [0, 2], "v": [0, 0]})},
        r"holds v \[0, 0\]",
    ),
    "fewer bytes than numbers": (lambda p: {"files": with_file(p, bytes=63)}, "of 63 bytes is too small for 8 elem"),
    "a gap at the start": (
        lambda p: {"files": with_file(p, ranges={"w": [1, 5], "b": [0, 2]})},
        "element 0 of w is missing or there twice",
    ),
    "an end that is left out": (
        lambda p: {"files": with_file(p, ranges={"w": [0, 5], "b": [0, 2]})},
        "5 elements of w are held, not 6",
    ),
    "more than the shape": (
        lambda p: {"files": with_file(p, ranges={"w": [0, 7], "b": [0, 2]})},
        "7 elements of w are held, not 6",
    ),
    "a parameter that nobody holds": (
        lambda p: {"files": with_file(p, ranges={"w": [0, 6]})},
        "0 elements of b are held, not 2",
    ),
    "too little for what is not absent": (
        lambda p: {"files": with_file(p, bytes=39), "absent": {"ema": ["w"]}},
        "of 39 bytes is too small",
    ),
    "an absent kind that there is not": (
        lambda p: {"files": with_file(p, bytes=63), "absent": {"exp_avg": ["w"]}},
        "of 63 bytes is too small",
    ),
    "an absent parameter that takes no bytes off": (
        lambda p: {"files": with_file(p, bytes=60), "absent": {"ema": ["projector"]}},
        "of 60 bytes is too small",
    ),
    "a version that is none": (lambda p: {"version": "4"}, "it.version is '4'"),
    "absent of no names": (lambda p: {"absent": {"ema": [3]}}, r"absent.ema\[0\] is 3"),
    "a clock that runs backwards": (lambda p: {"progress": {"samples_seen": -1, "data_fingerprint": ""}}, "is -1"),
    "a state of another version": (
        lambda p: {"progress": {"samples_seen": 1, "data_fingerprint": "", "mood": 1}},
        "progress: .*mood",
    ),
    "losses that are none": (
        lambda p: {"progress": {"samples_seen": 1, "data_fingerprint": "", "recent_losses": ["low"]}},
        r"progress.recent_losses\[0\] is 'low'",
    ),
    "no steps": (lambda p: {"optimizer_steps": None}, "it.optimizer_steps is None"),
    "latents without a shape": (lambda p: {"sampling": {}}, "sampling: "),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(checkpoint: Path, lie: str) -> None:
    change, said = LIES[lie]
    facts = json.loads((checkpoint / "manifest.json").read_text())
    seal(checkpoint, facts | change(checkpoint))
    with pytest.raises(Damaged, match=said) as caught:
        read_manifest(checkpoint)
    assert str(checkpoint / "manifest.json") in str(caught.value)


def test_elements_that_are_there_twice_are_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "twice", 40, {"master": {"w": W}}, files=2)
    facts = json.loads((path / "manifest.json").read_text())
    second = facts["files"]["rank-00001-of-00002.safetensors"]
    assert second["ranges"] == {"w": [3, 3]}
    second["ranges"] = {"w": [2, 4]}
    seal(path, facts)
    with pytest.raises(Damaged, match="element 2 of w is missing or there twice"):
        read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"files": with_file(p, bytes=64)},
        lambda p: {"files": with_file(p, bytes=40), "absent": {"ema": ["w"]}},
        lambda p: {"files": with_file(p, bytes=64), "absent": {"ema": ["projector"]}},  # of which nothing is here
        lambda p: {"version": 2},
    ],
)
def test_what_is_just_within_the_rules_is_read(checkpoint: Path, change: Callable[[Path], dict[str, Any]]) -> None:
    facts = json.loads((checkpoint / "manifest.json").read_text()) | change(checkpoint)
    seal(checkpoint, facts)
    assert read_manifest(checkpoint) == facts


def test_what_is_no_checkpoint_of_ours_is_told_from_a_damaged_one(checkpoint: Path) -> None:
    facts = json.loads((checkpoint / "manifest.json").read_text())
    for other in ([], 7, facts | {"format": "other"}):
        seal(checkpoint, other)
        with pytest.raises(InputError, match="is not an ldt checkpoint; its manifest does not say format"):
            read_manifest(checkpoint)
    seal(checkpoint, facts | {"version": 4})
    with pytest.raises(InputError, match="has format version 4; this ldt reads up to 3: upgrade ldt"):
        read_manifest(checkpoint)
    seal(checkpoint, b"{")
    with pytest.raises(Damaged, match=r"manifest.json is not JSON"):
        read_manifest(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(Damaged, match=r"manifest.json differs from its hash"):
        read_manifest(checkpoint)
    (checkpoint / "manifest.xxh64").write_bytes(b"\xff\xfe")
    with pytest.raises(Damaged, match=r"manifest.xxh64 is not a hash"):
        read_manifest(checkpoint)
    for name in ("manifest.xxh64", "manifest.json"):
        (checkpoint / name).unlink()
        with pytest.raises(Damaged, match=rf"has no readable {name}; it was not written to the end"):
            read_manifest(checkpoint)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_every_byte_of_a_file_is_hashed(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "CHUNK", chunk)
    file, content = tmp_path / "file", bytes(range(30))
    entry = {"bytes": 30, "xxh64": xxhash.xxh64(content).hexdigest()}
    file.write_bytes(content)
    verify_file(file, entry)
    for at in (0, 6, 7, 29):
        file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        with pytest.raises(Damaged, match="differs from its hash in the manifest"):
            verify_file(file, entry)
    file.write_bytes(content[:-1])
    with pytest.raises(Damaged, match="has 29 bytes instead of 30"):
        verify_file(file, entry)
    file.unlink()
    with pytest.raises(Damaged, match="can't be read: No such file or directory"):
        verify_file(file, entry)


def test_only_directories_called_by_numbers_are_listed_oldest_first(tmp_path: Path) -> None:
    assert listed(tmp_path / "nowhere") == []
    for name in ("000000000100", "000000000020", "000000000060.damaged", ".000000000010.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "000000000030").touch()
    assert [p.name for p in listed(tmp_path)] == ["000000000020", "000000000100"]


def test_a_state_begins_with_nothing_noted() -> None:
    state = TrainState.read({"samples_seen": 0, "data_fingerprint": ""})
    assert state == TrainState(0, "", [], 0, [], False, [])
