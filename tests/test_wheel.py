"""The wheel: built from the committed files, installed by itself, it is the whole program."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests" / "data" / "v0.1" / "run" / "checkpoints" / "000000000040"


def test_it_installs_and_samples(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ldt", source / "ldt", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("ldt_train-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-warn-script-location", "--target", site, wheel], check=True)

    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "ldt"], capture_output=True, text=True, check=True)
    missing = set(tracked.stdout.split()) - held
    assert not missing, f"not in the wheel: {sorted(missing)}"
    assert {"ldt/py.typed", "ldt/__init__.pyi", "ldt/assets/report/page.js"} <= held
    assert not [name for name in held if name.startswith(("tests/", "tools/"))]

    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}

    def ldt(*words: str) -> str:
        command = [sys.executable, "-P", str(site / "bin" / "ldt"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ldt train configs/debug.yaml" in ldt("--help")
    where = "import ldt; print(ldt.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.startswith(str(site)), found.stdout
    ldt("sample", str(CHECKPOINT), "images=2", "steps=1", "block=2", f"output={tmp_path}/grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 100
