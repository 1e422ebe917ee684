"""A short campaign of faults against real runs, and that its comparison would see a broken promise."""

import json

import forked
import pytest
from chaos import BATCH, Failed, campaign, compare

SHORT = [
    "kill_one",
    "kill_in_save",
    "kill_in_rename",
    "kill_in_load",
    "stop_one",
    "disk_full",
    "pause",
    "move_checkpoints",
]
"""The others are what other tests do: tests/test_kill.py, tests/test_checkpoint.py."""


def test_a_run_survives_every_fault(tmp_path, monkeypatch):
    start = lambda count, *words, **_: forked.start_ranks(count, *words, unprivileged=True)  # noqa: E731
    monkeypatch.setattr("chaos.start_ranks", start)
    rounds = campaign(tmp_path, SHORT, seed=3)
    assert {r.fault for r in rounds} == {*SHORT, "none"}


@pytest.fixture
def logs(tmp_path):
    """Two equal logs of 20 steps."""
    lines = [{"samples_seen": BATCH * i, "digest": f"{i:016x}", "loss": 1.0 + i} for i in range(1, 21)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(7), "missing or double: 19 lines for 20"),
        (lambda lines: lines.insert(7, lines[7]), "missing or double: 21 lines for 20"),
        (lambda lines: lines[4].update(digest="0"), "at 40 samples the digest is 0"),
        (lambda lines: lines[4].update(loss=6.001), "at 40 samples the loss is 6.001"),
    ],
)
def test_another_lineage_is_told(logs, change, message):
    compare(logs / "a", logs / "b", 20 * BATCH)
    lines = [json.loads(line) for line in (logs / "b" / "metrics.jsonl").read_text().splitlines()]
    change(lines)
    (logs / "b" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Failed, match=message):
        compare(logs / "a", logs / "b", 20 * BATCH)
