"""Captions from images to samples: stored in both formats, encoded, dropped, trained on and asked for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import streaming_package
import torch
import webdataset
from PIL import Image
from run_data import make_autoencoder, opened
from shard_data import make_loader
from training_cases import assert_same_run, refused_case, train_case

from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.load import load_denoiser
from ldt.checkpoint.manifest import read_manifest
from ldt.cli import main
from ldt.data.digest import digest_text
from ldt.data.shards import Manifest, open_shards
from ldt.dist import all_gather
from ldt.errors import InputError
from ldt.image_files import class_grid, read_cells
from ldt.log import read_jsonl
from ldt.models.text_encoder import ByteEncoder, load_text_encoder
from ldt.training import monitor

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
CAPTIONS = ["", "a red boot", "Stiefel für Äpfel – 靴", "x" * 100_000, "a coat", "one shirt", "boot boot boot", "last"]


def test_bytes_are_tokens():
    tokens = ByteEncoder(6).encode(["", "ab", "é!", "abcdefgh", "y" * 100_000])
    assert tokens.dtype == np.uint16 and tokens.shape == (5, 6)
    assert tokens[0].tolist() == [0] * 6
    assert tokens[1].tolist() == [98, 99, 0, 0, 0, 0]
    assert tokens[2].tolist() == [0xC3 + 1, 0xA9 + 1, 34, 0, 0, 0]
    assert bytes((tokens[3] - 1).tolist()).decode() == "abcdef" and (tokens[4] == ord("y") + 1).all()
    with pytest.raises(InputError, match="text.length=0"):
        load_text_encoder("bytes", 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images with captions beside them, and an autoencoder."""
    path = tmp_path_factory.mktemp("captioned")
    make_autoencoder(path / "vae")
    generator = np.random.default_rng(0)
    for i in range(40):
        folder = path / "images" / ["boots", "coats"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32), np.uint8)).save(folder / f"{i:03d}.png")
        if CAPTIONS[i % 8]:
            (folder / f"{i:03d}.txt").write_text(CAPTIONS[i % 8])
    return path


def encode(root, output, *settings):
    keys = [f"images.path={root}/images", "images.size=32", f"autoencoder={root}/vae", f"output={output}"]
    keys += ["shard_samples=7", "validation_fraction=0.1", "text.encoder=bytes", "text.length=12", "batch=5"]
    return main(["encode", *keys, *settings, "--quiet"])


@pytest.fixture(scope="module")
def data(root):
    for format in ("tar", "mds"):
        assert encode(root, root / format, f"format={format}") == 0
    return root


def captions_of(path):
    shards = open_shards(path)
    return [c for shard, n in enumerate(shards.manifest.counts.tolist()) for c in shards.captions(shard, range(n))]


def test_both_formats_hold_every_caption(data):
    """Of 0 and of 100,000 characters, and in any script."""
    tar, mds = Manifest.load(data / "tar"), Manifest.load(data / "mds")
    assert tar.fingerprint == mds.fingerprint and tar.text == mds.text
    assert tar.text["encoder"] == "bytes" and tar.text_shape == (12, 0, 257) and len(tar.text["examples"]) == 36
    assert max(len(caption) for _, caption in tar.text["examples"]) == 200
    found = captions_of(data / "tar")
    assert sorted(found + captions_of(data / "tar" / "validation")) == sorted(CAPTIONS * 5)
    assert found == captions_of(data / "mds")
    for format in ("tar", "mds"):
        shards = open_shards(data / format)
        records = shards.read([0] * 7, range(7), text=True)
        assert (records.text_n == ByteEncoder(12).encode(shards.captions(0, range(7)))).all()
        assert shards.read([0], [0]).text_n is None
    assert json.loads((data / "tar" / "manifest.json").read_text())["version"] == 3


def test_both_libraries_read_them(data):
    dataset = webdataset.WebDataset(
        [str(p) for p in sorted((data / "tar").glob("*.tar"))], shardshuffle=False, empty_check=False
    ).decode()
    rows = list(dataset)
    assert [row["txt"] for row in rows] == captions_of(data / "tar")
    assert (rows[1]["text.npy"] == ByteEncoder(12).encode([rows[1]["txt"]])[0]).all()
    streaming = streaming_package.load()
    theirs = streaming.StreamingDataset(local=str(data / "mds"), shuffle=False, batch_size=1)
    assert [theirs[i]["caption"] for i in range(36)] == captions_of(data / "mds")
    assert (theirs[3]["text"] == ByteEncoder(12).encode([theirs[3]["caption"]])[0]).all()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_captioned_shards_of_others_are_indexed(data, tmp_path, format, capsys):
    for path in (data / format).glob(f"*.{format}"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = ["encode", f"index={tmp_path}", f"autoencoder={data}/vae", "--quiet"]
    assert main(index) == 2
    assert "holds encoded captions; say by what, as in text.encoder=bytes" in capsys.readouterr().err
    assert main([*index, "text.encoder=bytes"]) == 0
    assert captions_of(tmp_path) == captions_of(data / format)
    ours, theirs = Manifest.load(data / format), Manifest.load(tmp_path)
    assert (ours.table["content"] == theirs.table["content"]).all()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_tokens_that_the_encoder_does_not_have_are_refused(data, tmp_path, format, capsys):
    """Whoever encoded them had more words than bytes have: in training they'd be looked up beyond the table."""
    for path in (data / format).glob(f"*.{format}"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob(f"*.{format}"))[0]
    content, tokens = bytearray(shard.read_bytes()), ByteEncoder(12).encode(["a coat"]).tobytes()
    at = content.index(tokens)
    content[at : at + 2] = (257).to_bytes(2, "little")
    shard.write_bytes(content)
    index = ["encode", f"index={tmp_path}", f"autoencoder={data}/vae", "text.encoder=bytes", "--quiet"]
    assert main(index) == 2
    assert "is not token numbers below 257" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_damage_is_found(data, tmp_path, format):
    """A caption that is no UTF-8, and one whose length is wrong, under hashes that fit."""
    for path in (data / format).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").unlink()
    shard = sorted(tmp_path.glob(f"*.{format}"))[0]
    content = bytearray(shard.read_bytes())
    if format == "tar":
        content[content.index(b"a coat")] = 0xFF
    else:
        at = content.index(b"a coat")
        content[at - 4 : at] = (5).to_bytes(4, "little")
    shard.write_bytes(content)
    assert main(["encode", f"index={tmp_path}", f"autoencoder={data}/vae", "text.encoder=bytes", "--quiet"]) == 2


def test_mistakes_of_encoding_are_named(root, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("L", (32, 32)).save(bare / "0.png")
    Image.new("L", (32, 32)).save(bare / "1.png")
    assert encode(root, tmp_path / "a", f"images.path={bare}") == 2
    assert "has no captions for text.encoder=bytes; put x.txt beside x.png" in capsys.readouterr().err
    (bare / "0.txt").write_bytes(b"\xff\xfe")
    assert encode(root, tmp_path / "b", f"images.path={bare}") == 2
    assert "0.png is not UTF-8 text" in capsys.readouterr().err
    assert encode(root, tmp_path / "c", "text.encoder=models/none") == 2
    assert "text encoder models/none needs transformers; pip install ldt-train[text]" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ order and training


def draws(data, format, ranks, condition_on, steps=60, drop=0.2, seed=3):
    """Everything the network is told in some steps, by index, and the digests."""
    told, digests = {}, []
    loaders = [
        make_loader(open_shards(data / format), batch=8, seed=seed, window=9, streams=2, rank=r, ranks=ranks,
               label_drop=drop, condition_on=condition_on)
        for r in range(ranks)
    ]  # fmt: skip
    running = [loader.steps() for loader in loaders]
    for _ in range(steps):
        total = 0
        for steps_of_rank in running:
            step = next(steps_of_rank)
            total += step.digest
            for batch in step.micro_batches:
                for i in batch.weight_B.nonzero()[:, 0].tolist():
                    text = None if batch.text is None else batch.text[i].tolist()
                    told[int(batch.index_B[i])] = (int(batch.label_B[i]), text)
        digests.append(digest_text(total))
    for loader in loaders:
        loader.close()
    return told, digests


def test_captions_belong_to_the_order_not_to_the_cluster(data):
    alone, digests = draws(data, "tar", 1, "class_and_text")
    split, same = draws(data, "mds", 3, "class_and_text")
    assert alone == split and digests == same
    _, without = draws(data, "tar", 1, "class")
    assert not set(digests) & set(without)  # text is part of what a digest vouches for


def test_class_and_text_are_dropped_together_and_apart(data):
    told, _ = draws(data, "tar", 1, "class_and_text", steps=400)
    kinds = np.array([(label == 2, not any(text)) for label, text in told.values()])
    empty = 1 / 8  # captions that are empty anyway
    both, label, text = kinds.all(1).mean(), kinds[:, 0].mean(), kinds[:, 1].mean()
    assert abs(label - (0.2 + 0.8 * 0.2)) < 0.03
    assert abs(text - (0.36 + 0.64 * empty)) < 0.03
    assert abs(both - (0.2 + 0.16 * empty)) < 0.03
    plain, _ = draws(data, "tar", 1, "class", steps=400)
    assert all(text is None for _, text in plain.values())
    assert abs(np.mean([label == 2 for label, _ in plain.values()]) - 0.2) < 0.03
    alone, _ = draws(data, "tar", 1, "text", steps=400)
    dropped = [not any(text) for _, text in alone.values()]
    assert abs(np.mean(dropped) - (0.2 + 0.8 * empty)) < 0.03
    assert [label == 2 for label, _ in alone.values()] == [label == 2 for label, _ in plain.values()]


TEXT = ["model={width: 32, depth: 2, heads: 2, condition_on: class_and_text}", "train.total_samples=80"]


@pytest.fixture(scope="module")
def run_dir(pool, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    settings = [*TEXT, f"data.path={data}/tar", "log.samples_every_samples=80", "log.validation_every_samples=80"]
    one = pool(1).run(train_case, settings=[*settings, f"run_dir={path}/one"])
    two = pool(2).run(train_case, settings=[*settings, f"run_dir={path}/two", "engine.zero_stage=3"])
    assert_same_run(one, two)
    return path / "one"


def previews_case(world, settings: list[str]) -> list[int]:
    """How often each rank loaded the text encoder in a run with five previews."""
    loads, real = [], monitor.reload_text_encoder
    monitor.reload_text_encoder = lambda *a: loads.append(1) or real(*a)
    try:
        train_case(world, settings)
    finally:
        monitor.reload_text_encoder = real
    return all_gather(len(loads))


def test_previews_load_the_text_encoder_once_and_on_one_rank(pool, data, run_dir, tmp_path):
    settings = [*TEXT, f"data.path={data}/tar", f"run_dir={tmp_path}/run", "log.samples_every_samples=16",
                "train.global_batch=16"]  # fmt: skip
    assert pool(2).run(previews_case, settings=settings) == [1, 0]
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 5


def test_a_checkpoint_of_text_is_enough_to_sample_from(run_dir, tmp_path, capsys):
    manifest = read_manifest(resolve(run_dir))
    assert manifest["sampling"]["text"]["encoder"] == "bytes"
    assert load_denoiser(run_dir).spec.text_shape == (12, 0, 257)
    image_NHWC, label_N, samples_seen = read_cells(run_dir / "samples" / "newest.npz")
    with Image.open(run_dir / "samples" / "000000000080.png") as newest:
        assert samples_seen == 80 and np.array_equal(np.asarray(newest), np.asarray(class_grid(image_NHWC, label_N)))
    command = ["sample", str(run_dir), "images=4", "block=4", "steps=2", "--quiet"]
    (tmp_path / "prompts.txt").write_text("a coat\n\n")
    assert main([*command, f"prompts=[a red boot,{tmp_path}/prompts.txt]", f"output={tmp_path}/a.png"]) == 0
    assert opened(tmp_path / "a.png").size == (200 + 2 * 34 + 2, 3 * 34 + 2)
    outputs = []
    for i, words in enumerate(("a red boot", "a coat", "")):
        path = tmp_path / f"{i}"
        assert main([*command, f"prompts=['{words}']", "format=folder", f"output={path}"]) == 0
        assert json.loads((path / "samples.json").read_text())["labels"] == [2] * 4  # no class
        outputs.append(np.stack([np.asarray(opened(path / f"{k:06d}.png")) for k in range(4)]))
    assert main([*command, "classes=[coats]", "prompts=[a coat]", "format=npz", f"output={tmp_path}/x.npz"]) == 0
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1] * 4
    capsys.readouterr()
    assert main([*command, "prompts=[none.txt]"]) == 2
    assert "prompts file none.txt can't be read" in capsys.readouterr().err
    assert main([*command, "prompts=[flag: japan]"]) == 2
    assert "is not text; put a caption with a colon in quotes" in capsys.readouterr().err


def test_captions_reach_the_denoiser_of_a_checkpoint(run_dir):
    from ldt.sampling.config import DrawConfig
    from ldt.sampling.draw import image_model, sample_images

    loaded = load_denoiser(run_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in loaded.denoiser.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model = image_model(loaded, "fp32", torch.device("cpu"))
    config, labels = DrawConfig(steps=2, guidance=2.0), np.full(4, 2)
    boot, coat, none = (sample_images(model, range(4), config, labels, [p]) for p in ("a red boot", "a coat", ""))
    assert not torch.equal(boot, coat) and not torch.equal(boot, none)
    default = sample_images(model, range(4), config)
    examples = model.examples[:4]
    expected = sample_images(model, range(4), config, np.array([k for k, _ in examples]), [c for _, c in examples])
    assert torch.equal(default, expected)


def test_images_are_compared_with_the_captions_they_were_drawn_of(data, run_dir, tmp_path, capsys):
    """`ldt evaluate` against every image's nearest real one, by hand; and the captions are part of the result."""
    from ldt.data.images import open_images, prepare
    from ldt.metrics.detectors import make_detector
    from ldt.sampling.config import DrawConfig
    from ldt.sampling.draw import image_model, sample_images

    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    keys = {"images": 18, "sampler": "euler", "steps": 2, "block": 9, "cache_dir": tmp_path / "cache"}
    words = [f"evaluate.{k}={v}" for k, v in keys.items()]
    assert main(["evaluate", str(run), *words, "evaluate.metrics=[caption_retrieval]"]) == 0
    (result,) = read_jsonl(run / "evaluations.jsonl")
    assert "caption_retrieval_efficientnet_lite0 " in capsys.readouterr().out

    model, detector = image_model(load_denoiser(run), "fp32", torch.device("cpu")), make_detector("efficientnet_lite0")
    drawing = DrawConfig(sampler="euler", steps=2, block=9)
    made = torch.cat([detector(sample_images(model, range(k, k + 9), drawing)).feature_BD for k in (0, 9)])
    source = open_images(f"{data}/images")
    real = detector(torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "crop") for i in range(40)]))).feature_BD
    borne = [source.caption(i)[:200] for i in range(40)]
    asked = [model.examples[i % len(model.examples)][1] for i in range(18)]
    nearest = torch.cdist(made.double(), real.double()).argsort(1)[:, :5].tolist()
    told = [i for i in range(18) if asked[i]]
    assert 0 < len(told) < 18
    first = np.mean([borne[nearest[i][0]] == asked[i] for i in told])
    among = np.mean([asked[i] in [borne[j] for j in nearest[i]] for i in told])
    chance = np.mean([borne.count(asked[i]) / 40 for i in told])
    assert result["caption_retrieval_efficientnet_lite0"] == pytest.approx(first)
    assert result["caption_retrieval_top5_efficientnet_lite0"] == pytest.approx(among)
    assert result["caption_retrieval_chance"] == pytest.approx(chance)

    file = next(Path(f"{data}/images").rglob("*.txt"))
    before = file.read_text()
    file.write_text("another")
    assert main(["evaluate", str(run), *words, "evaluate.metrics=[caption_retrieval]"]) == 0
    file.write_text(before)
    assert len({r["captions_hash"] for r in read_jsonl(run / "evaluations.jsonl")}) == 2, "not the same evaluation"

    np.savez(tmp_path / "statistics.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    told = [*words, "evaluate.metrics=[caption_retrieval]", f"evaluate.reference={tmp_path}/statistics.npz"]
    assert main(["evaluate", str(run), *told]) == 2
    assert "statistics.npz holds no captions" in capsys.readouterr().err


def test_the_wrong_kind_of_condition_is_refused(pool, data, run_dir, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert encode(data, plain, "text.encoder=''") == 0
    settings = [*TEXT, f"data.path={plain}", f"run_dir={tmp_path}/run"]
    said = pool(1).run(refused_case, settings=settings)
    assert "model.condition_on=class_and_text needs encoded captions, and the data have none" in said
    settings = ["train.total_samples=16", f"data.path={data}/tar", f"run_dir={tmp_path}/classes"]
    pool(1).run(train_case, settings=settings)  # captions that are not asked for are in nobody's way
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "classes"), "prompts=[a coat]", "--quiet"]) == 2
    assert "prompts= needs a denoiser of text, and this one was trained with classes only" in capsys.readouterr().err
    told = ["evaluate.metrics=[caption_retrieval]", f"evaluate.cache_dir={tmp_path}/cache", "--quiet"]
    assert main(["evaluate", str(tmp_path / "classes"), *told]) == 2
    assert "needs a denoiser of captions, and" in capsys.readouterr().err
    texts = ["model={width: 32, depth: 2, heads: 2, condition_on: text}", "train.total_samples=16"]
    pool(1).run(train_case, settings=[*texts, f"data.path={data}/tar", f"run_dir={tmp_path}/texts"])
    assert main(["sample", str(tmp_path / "texts"), "classes=[coats]", "--quiet"]) == 2
    assert "classes= needs a denoiser of classes, and this one was trained with text only" in capsys.readouterr().err
