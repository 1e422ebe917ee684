"""`ldt inspect` of shards: what they are, 0 when whole, 1 when damaged, 2 when not ours."""

import numpy as np
import pytest
from PIL import Image
from shard_data import write_shards

from ldt import cli


def test_whole_shards_are_described_and_drawn(encode, tmp_path, capsys):
    assert encode(tmp_path / "out", flips=True) == 0
    grid = tmp_path / "grid.png"
    assert cli.main(["inspect", str(tmp_path / "out"), f"grid={grid}"]) == 0
    said = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in said.splitlines() if "  " in line)
    assert facts["samples"].strip() == "18" and facts["shards whose hash is right"].strip() == "4"
    assert facts["measured mean"].strip() == facts["whitening mean"].strip()
    assert facts["measured std"].strip() == facts["whitening std"].strip()
    assert sum(int(facts[f"class {c}"]) for c in ("ant", "bee", "cat")) == 18
    assert np.asarray(Image.open(grid)).size > 18 * 64


@pytest.mark.parametrize("format", ["tar", "mds"])
@pytest.mark.parametrize("file", ["shard", "manifest.json", "shards.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_exit_1_and_named(tmp_path, capsys, format, file, damage):
    write_shards(tmp_path, [5, 6], format)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    path = tmp_path / (f"shard-00000001.{format}" if file == "shard" else file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 2
    path.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "missing":
        path.unlink()
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert path.name in capsys.readouterr().out


def test_other_things_are_exit_2(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nowhere"):
        assert cli.main(["inspect", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
