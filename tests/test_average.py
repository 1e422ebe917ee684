"""Averages of any width from handwritten checkpoints and snapshots of a run; tests/test_export.py has trained ones."""

from pathlib import Path

import pytest
import torch
from small_checkpoints import write_checkpoint

from ldt.checkpoint.average import reconstruct
from ldt.checkpoint.checkpoint import Checkpoint
from ldt.engine.ema import reconstruction
from ldt.errors import InputError

NARROW, WIDE = {"kind": "power", "width": 0.05}, {"kind": "power", "width": 0.1}


def save(path: Path, samples_seen: int, averages: dict | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint with random averages: what it holds of each kind."""
    generator = torch.Generator().manual_seed(samples_seen)
    held = {kind: torch.randn(2, 3, generator=generator) for kind in ("ema", "ema_0.1")}
    averages = {"ema": NARROW, "ema_0.1": WIDE} if averages is None else averages
    write_checkpoint(path, samples_seen, {kind: {"w": w} for kind, w in held.items()}, files=2, averages=averages)
    return held


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints at 1000 and 2000, snapshots at 500, 1000 and 1500: the run, and what each holds."""
    (tmp_path / "config.yaml").touch()
    held = {n: save(tmp_path / "checkpoints" / f"{n:012d}", n) for n in (1000, 2000)}
    held |= {n: save(tmp_path / "ema" / f"{n:012d}", n) for n in (500, 1500)}
    write_checkpoint(
        tmp_path / "ema" / f"{1000:012d}", 1000, {"ema": {"w": torch.zeros(2, 3)}}, averages={"ema": NARROW}
    )
    return tmp_path, held


def test_all_that_was_stored_up_to_a_checkpoint_is_combined(run) -> None:
    path, held = run
    weights, facts = reconstruct(Checkpoint.read(path / "checkpoints" / f"{1000:012d}"), 0.07)
    stored = [(n, w) for n in (500, 1000) for w in (0.05, 0.1)]
    coefficients = reconstruction(stored, 1000, 0.07)
    kinds = {0.05: "ema", 0.1: "ema_0.1"}
    expected = sum(c * held[n][kinds[w]].double() for c, (n, w) in zip(coefficients, stored, strict=True))
    assert weights.keys() == {"w"} and weights["w"].dtype == torch.float32
    torch.testing.assert_close(weights["w"], expected.float())
    names = [f"{n:012d}/{kinds[w]}" for n, w in stored]
    assert facts["made_from"] == dict(zip(names, coefficients, strict=True))
    assert facts["samples_seen"] == 1000 and facts["weights"] == "power average of width 0.07"
    assert facts["config"] == {"model": {}, "objective": {}} and facts["sampling"]["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_the_widths_at_the_ends_are_those_that_were_stored(run, width: float) -> None:
    path, held = run
    weights, _ = reconstruct(Checkpoint.read(path / "checkpoints" / f"{2000:012d}"), width)
    torch.testing.assert_close(weights["w"], held[2000]["ema" if width == 0.05 else "ema_0.1"], rtol=0, atol=1e-5)


def test_a_damaged_snapshot_is_left_out_and_named(run, caplog) -> None:
    path, _ = run
    file = next((path / "ema" / f"{500:012d}").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    save(path / "ema" / f"{700:012d}", 700)
    _, facts = reconstruct(Checkpoint.read(path / "checkpoints" / f"{1000:012d}"), 0.07)
    assert list(facts["made_from"]) == [f"{n:012d}/{kind}" for n in (700, 1000) for kind in ("ema", "ema_0.1")]
    assert f"left out: {file} has" in caplog.text


def test_outside_of_its_run_a_checkpoint_has_its_own_averages_alone(run, tmp_path) -> None:
    moved = (run[0] / "checkpoints" / f"{1000:012d}").rename(tmp_path / "best")
    _, facts = reconstruct(Checkpoint.read(moved), 0.07)
    assert list(facts["made_from"]) == [f"{1000:012d}/ema", f"{1000:012d}/ema_0.1"]
    with pytest.raises(InputError, match=r"ema_width=0\.2 lies outside .* 0\.05 to 0\.1; it lies outside of its run"):
        reconstruct(Checkpoint.read(moved), 0.2)


def test_what_can_not_be_reconstructed_is_explained(run, tmp_path) -> None:
    inside = Checkpoint.read(run[0] / "checkpoints" / f"{1000:012d}")
    for width in (0.04, 0.11):
        with pytest.raises(InputError, match=r"was trained with, 0\.05 to 0\.1; choose one between them"):
            reconstruct(inside, width)
    widest = write_checkpoint(
        tmp_path / "three",
        40,
        {kind: {"w": torch.ones(3)} for kind in ("a", "b", "c")},
        averages={kind: {"kind": "power", "width": w} for kind, w in (("a", 0.1), ("b", 0.2), ("c", 0.05))},
    )
    assert len(reconstruct(Checkpoint.read(widest), 0.15)[1]["made_from"]) == 3
    half_life = {"ema": {"kind": "half_life", "half_life": 500}}
    for averages in ({}, half_life):
        save(tmp_path / f"alone-{len(averages)}", 40, averages)
        with pytest.raises(InputError, match=r"holds no power averages to reconstruct others from; train with ema"):
            reconstruct(Checkpoint.read(tmp_path / f"alone-{len(averages)}"), 0.07)
