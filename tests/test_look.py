"""A look at all images before encoding: by any number of ranks and threads, once, also over interruptions."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ldt.data.images.source import ImageSource
from ldt.dist import World
from ldt.encoding.look import OLD_S, look, remove_old
from ldt.errors import InputError, RunError

ALONE, COUNT = World(0, 1, 0, 1, torch.device("cpu")), 1000


class Numbers(ImageSource):
    classes = ("images",)

    def __len__(self):
        return COUNT

    def label(self, i):
        return 0

    key = name = image = label


def see(number):
    if number % 97 == 3:
        raise InputError(f"image {number} is not readable")
    return number + 1, 2 * number


def expected():
    size_N2 = np.array([see(i) if i % 97 != 3 else (0, 0) for i in range(COUNT)])
    return size_N2, {i: f"image {i} is not readable" for i in range(3, COUNT, 97)}


def same(seen):
    size_N2, reasons = expected()
    return np.array_equal(seen.size_N2, size_N2) and seen.reasons == reasons


def test_an_interrupted_look_goes_on(tmp_path):
    asked = []

    def dying(number):
        asked.append(number)
        if len(asked) == 500:
            raise KeyboardInterrupt
        return see(number)

    with pytest.raises(KeyboardInterrupt):
        look(Numbers(), dying, 2, ALONE, tmp_path, skip=True)
    asked_before = len(set(asked))
    assert same(look(Numbers(), dying, 2, ALONE, tmp_path, skip=True))
    assert asked_before < COUNT and len(asked) < COUNT + 20, "only what was in the air is looked at again"
    asked.clear()
    assert same(look(Numbers(), dying, 2, ALONE, tmp_path, skip=True)) and not asked
    for k, spoiled in enumerate([b"", b"[]", b'{"sizes": [[1]], "reasons": {}}', b'{"sizes": [[-1, 2]]}']):
        (tmp_path / f"{k:06d}.json").write_bytes(spoiled)
    assert same(look(Numbers(), dying, 2, ALONE, tmp_path, skip=True)) and 0 < len(asked) <= 4 * 4


def test_without_skip_the_first_one_is_named():
    with pytest.raises(InputError, match="image 3 is not readable"):
        look(Numbers(), see, 3, ALONE)
    assert same(look(Numbers(), see, 3, ALONE, skip=True))


def test_what_can_not_be_kept_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert same(look(Numbers(), see, 2, ALONE, tmp_path / "file" / "below", skip=True))
    assert caplog.text.count("can't be kept") == 1, "once, not for every block"


def test_looks_with_which_nobody_goes_on_are_removed(tmp_path):
    for name, age in (("looked-a", 2 * OLD_S), ("looked-b", OLD_S / 2), ("index.npz", 2 * OLD_S)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "000000.json").write_text("{}")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_old(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.npz", "looked-b"]


def case(world, kept, fail):
    def mine(number):
        if fail and number == 990:
            raise RunError("the network is gone")
        return see(number)

    try:
        seen = look(Numbers(), mine, 2, world, Path(kept) if kept else None, skip=True)
    except RunError as error:
        return str(error)
    return same(seen)


def test_ranks_share_the_images_and_a_failure_of_one_ends_all(pool, tmp_path):
    assert pool(3).run(case, kept="", fail=False) is True
    assert pool(2).run(case, kept=str(tmp_path), fail=True) == "the network is gone"
    there = {int(p.stem) for p in tmp_path.iterdir()}
    assert pool(2).run(case, kept=str(tmp_path), fail=False) is True
    assert 0 < len(there) < len(list(tmp_path.iterdir())) == -(-COUNT // 3)
    held = [json.loads(p.read_text()) for p in sorted(tmp_path.iterdir())]
    assert sum(len(one["reasons"]) for one in held) == len(expected()[1])
