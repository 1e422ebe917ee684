"""`tools/gpu_check.sh` on a CPU: it finds nothing where nothing is wrong, and says what is wrong where it is."""

import json
import subprocess
from pathlib import Path

import gpu_check
import pytest

ROOT = Path(__file__).parents[1]


def test_it_runs_and_tells(tmp_path):
    """One of the trainings and the kernels; the whole takes 5 minutes here."""
    only = ["fp32-zero2-2", "attention"]
    command = ["bash", "tools/gpu_check.sh", str(tmp_path), "--only", *only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"all is well: {tmp_path}/gpu_check.html"
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["ok"] and [r["name"] for r in report["checks"]] == ["reference", *only]
    assert all(name in (tmp_path / "gpu_check.html").read_text() for name in only)


@pytest.mark.parametrize(
    ("loss", "digest", "words"), [(1.0, "a", "ok"), (1.001, "a", "losses 1.0e-03 off"), (1.0, "b", "digests DIFFER")]
)
def test_what_differs_is_red(tmp_path, monkeypatch, loss, digest, words):
    def run(directory, name, *rest):
        (directory / name).mkdir()
        mine = {"loss": loss, "digest": digest} if name == "here" else {"loss": 1.0, "digest": "a"}
        line = json.dumps({"samples_seen": 24, "images_per_second": 1.0, **mine})
        (directory / name / "metrics.jsonl").write_text(line + "\n")

    monkeypatch.setattr(gpu_check, "run", run)
    run(tmp_path, "cpu")
    found = gpu_check.train(tmp_path, "here", 1, 1e-5)
    assert found["ok"] == (words == "ok") and (words == "ok" or words in found["detail"])


def test_a_check_that_fails_is_a_finding(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no CUDA")

    monkeypatch.setattr(gpu_check, "checks", lambda directory: [("reference", broken)])
    monkeypatch.setattr("sys.argv", ["gpu_check", str(tmp_path)])
    assert gpu_check.main() == 1
    assert "RuntimeError: no CUDA" in (tmp_path / "gpu_check.html").read_text()
