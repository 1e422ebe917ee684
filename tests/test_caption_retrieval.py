"""Whether images show what their captions ask for: against brute force, and through the programs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldt.dist import World
from ldt.errors import InputError
from ldt.evaluation.sets import ScoreJob, score_sets
from ldt.metrics.captions import _chance, caption_retrieval

generator = np.random.default_rng(0)
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
WORDS = ["boot", "coat", "shirt", "bag"]


def brute_force(generated, real, asked, borne):
    """Image by image, all real ones sorted by their distances."""
    shares = np.zeros(2)
    told = [i for i in range(len(asked)) if asked[i]]
    for i in told:
        order = sorted(range(len(real)), key=lambda j: ((generated[i] - real[j]) ** 2).sum())
        shares += [borne[order[0]] == asked[i], asked[i] in [borne[j] for j in order[:5]]]
    return shares / len(told)


@pytest.mark.parametrize("images", [1, 7, 60])
def test_it_is_what_brute_force_finds(images):
    generated, real = generator.standard_normal((images, 6)), generator.standard_normal((40, 6))
    asked, borne = ([WORDS[k] for k in generator.integers(0, 4, n)] for n in (images, 40))
    if images > 1:
        asked[3] = ""
    found = caption_retrieval(generated.astype(np.float32), real.astype(np.float32), asked, borne)
    assert [found.top1, found.top5] == pytest.approx(brute_force(generated, real, asked, borne))


def test_chunks_play_no_part(monkeypatch):
    generated, real = generator.standard_normal((25, 6)), generator.standard_normal((12, 6))
    asked, borne = ([WORDS[k] for k in generator.integers(0, 4, n)] for n in (25, 12))
    whole = caption_retrieval(generated, real, asked, borne)
    monkeypatch.setattr("ldt.metrics.captions.CHUNK", 4)
    assert caption_retrieval(generated, real, asked, borne) == whole


def test_chance_is_that_of_blind_draws():
    """All subsets of five counted out; and a caption that no real image bears has none."""
    borne = ["a", "a", "b", "c", "c", "c", "d"]
    for caption in "abcde":
        sets = list(itertools.combinations(borne, 5))
        expected = sum(caption in s for s in sets) / len(sets)
        assert _chance(borne.count(caption), len(borne), 5) == pytest.approx(expected)
    found = caption_retrieval(np.zeros((3, 2)), generator.standard_normal((7, 2)), ["a", "c", "e"], borne)
    assert found.chance == pytest.approx((2 / 7 + 3 / 7 + 0) / 3)


def test_features_without_meaning_are_at_chance():
    """And those of the very images are always right."""
    real, borne = generator.standard_normal((400, 8)), [WORDS[k] for k in generator.integers(0, 4, 400)]
    asked = [WORDS[k] for k in generator.integers(0, 4, 400)]
    blind = caption_retrieval(generator.standard_normal((400, 8)), real, asked, borne)
    assert blind.top1 == pytest.approx(blind.chance, abs=0.08)
    assert blind.top5 == pytest.approx(blind.chance_top5, abs=0.08)
    assert caption_retrieval(real, real, borne, borne)[:2] == (1, 1)


def test_fewer_than_five_real_images():
    found = caption_retrieval(np.zeros((2, 2)), np.ones((3, 2)), ["a", "b"], ["a", "a", "a"])
    assert found == (0.5, 0.5, 0.5, 0.5)


def test_no_captions_at_all():
    with pytest.raises(InputError, match="needs images that were drawn of captions"):
        caption_retrieval(np.zeros((2, 2)), np.ones((3, 2)), ["", ""], ["a", "b", "c"])


# ------------------------------------------------------------------------------------------------- through the programs


def captioned(directory: Path, count: int, tone: int) -> Path:
    """Grey squares whose captions are their tones."""
    directory.mkdir()
    for i in range(count):
        word = WORDS[(i + tone) % 4]
        Image.fromarray(np.full((8, 8), 60 * WORDS.index(word) + i % 5, np.uint8)).save(directory / f"{i:03d}.png")
        (directory / f"{i:03d}.txt").write_text(word)
    return directory


def test_of_sets_with_captions_beside_them(tmp_path):
    keys = {"metrics": ["caption_retrieval"], "cache_dir": str(tmp_path), "output": str(tmp_path / "s.jsonl")}
    real, made = captioned(tmp_path / "real", 40, 0), captioned(tmp_path / "made", 8, 0)
    result = score_sets(ScoreJob(images=str(made), reference=str(real), **keys), ALONE)
    assert result["caption_retrieval_efficientnet_lite0"] == result["caption_retrieval_top5_efficientnet_lite0"] == 1
    assert result["caption_retrieval_chance"] == 0.25
    for i in range(4):  # half of the captions are of another image now
        (made / f"{i:03d}.txt").write_text(WORDS[(i + 1) % 4])
    result = score_sets(ScoreJob(images=str(made), reference=str(real), **keys), ALONE)
    assert result["caption_retrieval_efficientnet_lite0"] == 0.5
    for file in real.glob("*.txt"):
        file.unlink()
    with pytest.raises(InputError, match="real has no captions, which metrics=caption_retrieval compares"):
        score_sets(ScoreJob(images=str(made), reference=str(real), **keys), ALONE)
