"""What a run takes of another model's weights, what it makes anew when told to, and what it says of both."""

import hashlib
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from engine_reference import gather
from shard_data import write_shards

from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.config import from_dict, to_dict
from ldt.data.images.embedded import FashionMNIST
from ldt.data.latent_spec import LatentSpec, pack_statistics
from ldt.data.shards import open_shards
from ldt.diffusion.config import ObjectiveConfig
from ldt.dist import World
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import Engine
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import ModelConfig, UNetConfig
from ldt.nn.sizes import dit_of, uvit
from ldt.training.config import TrainJob
from ldt.training.init_from import Side, Source, describe_differences, fit, start_from
from ldt.training.setup import describe_constant

SETTINGS = ["seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "log.every_samples=8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("root")
    write_shards(path / "data", [40, 23])
    assert train(path, "first", 8).returncode == 0
    return path


def train(root, name, samples, *settings):
    words = [*SETTINGS, f"run_dir={root}/{name}", f"data.path={root}/data", f"train.total_samples={samples}", *settings]
    return forked.run("-m", "ldt", "train", *words)


def test_another_objective_and_checkpoints_of_its_own_are_said(root):
    begun = train(root, "second", 8, f"train.init_from={root}/first", "objective.condition_drop=0.2")
    assert begun.returncode == 0, begun.stderr
    assert "were trained with objective.condition_drop=0.1, and go on here with 0.2" in begun.stderr
    assert begun.stderr.count("were trained with objective.") == 1 and "is not read" not in begun.stderr
    resumed = train(root, "second", 16, f"train.init_from={root}/first", "objective.condition_drop=0.2")
    assert "is not read: the run has checkpoints of its own" in resumed.stderr
    assert "were trained with" not in resumed.stderr


def test_a_refusal_advises_what_can_help(root):
    refused = train(root, "third", 8, f"train.init_from={root}/first", "model.width=64")
    assert refused.returncode == 2 and "set model.* as there" in refused.stderr and "run_dir" not in refused.stderr


def test_a_channel_that_never_changes_is_said(root):
    spec = open_shards(root / "data").manifest.spec
    assert list(describe_constant(spec)) == []
    (line,) = describe_constant(replace(spec, std_C=[1.0, 3e-9, 1.0, 0.0]))
    assert "never change in channel 1, 3 " in line


def test_an_element_that_never_changes_is_said_where_elements_are_whitened(root):
    """The deviation of its channel may be large: elements differ from each other."""
    spec = open_shards(root / "data").manifest.spec
    std_CHW = np.full(spec.latent_shape, 2.0)

    def lines() -> list[str]:
        by_element = {"mean_CHW": pack_statistics(np.zeros_like(std_CHW)), "std_CHW": pack_statistics(std_CHW)}
        return list(describe_constant(replace(spec, **by_element)))

    assert lines() == []
    std_CHW[1, 0, 1] = 3e-9
    (line,) = lines()
    assert f"never change in 1 of {std_CHW.size} elements, the first [1, 0, 1] " in line
    std_CHW[2] = 0.0
    (line,) = lines()
    assert "never change in channel 2 " in line


# ---------------------------------------------------------------------------------- the decision about each parameter

BYTES = {"encoder": "bytes", "hash": "b", "length": 3, "width": 0, "vocabulary": 257, "examples": []}
IN_CONTEXT = ModelConfig(width=32, depth=2, heads=2)
LEARNED = replace(IN_CONTEXT, positions="learned")
DIT = dit_of(32, 2, 2, 2)


def side(model=IN_CONTEXT, classes=("ant", "bee", "cat"), shape=(4, 4, 4), text=None, autoencoder="a"):
    facts = {"latent_shape": shape, "classes": list(classes), "mean_C": [0.0], "std_C": [1.0], "text": text or {}}
    hashes = {"autoencoder": autoencoder, "autoencoder_hash": autoencoder}
    return Side(model, LatentSpec(**facts, **hashes, image_size=8, image_channels=1))


def shapes_of(there):
    with torch.device("meta"):
        model = build(there.model, there.spec.latent_shape, len(there.spec.classes), seed=9, text=there.spec.text_shape)
    return {k: tuple(p.shape) for k, p in model.named_parameters() if p.requires_grad}


def source_of(there):
    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(there).items()}
    return Source(Path("there"), weights, there, ObjectiveConfig(), 1234)


def fitted(theirs, ours, fresh=(), resize=()):
    source = source_of(theirs)
    start = fit(source, ours, shapes_of(ours), fresh, resize)
    for name, taken in start.taken.items():
        assert taken.value.shape == shapes_of(ours)[name]
    return source.weights, start


def test_the_same_model_is_taken_whole():
    unet = ModelConfig(name="unet", unet=UNetConfig(32, [1], 1, 32, 32))
    for model in (IN_CONTEXT, LEARNED, DIT, replace(uvit("S/2"), width=32, depth=3, heads=2), unet):
        theirs = side(model)
        weights, start = fitted(theirs, theirs)
        assert start.taken.keys() == weights.keys() and len(start.lines) == 1
        assert all(t.mask is None and torch.equal(t.value, weights[n]) for n, t in start.taken.items())


def test_class_rows_go_by_name():
    weights, start = fitted(side(), side(classes=("cat", "ant")))
    assert torch.equal(start.taken["label.weight"].value, weights["label.weight"][[2, 0, 3]])
    assert "label.weight: rows of 2 classes by their names, 1 classes left out" in start.lines
    weights, start = fitted(side(classes=("0", "1", "2")), side())
    assert torch.equal(start.taken["label.weight"].value, weights["label.weight"])
    assert any("3 classes by their numbers" in line for line in start.lines)


def test_new_classes_are_made_anew_only_on_request():
    other = side(classes=("bee", "dog", "cat", "eel"))
    with pytest.raises(
        InputError, match=r"label.weight knows no class dog, eel; .*init_fresh=\[label\].*init_resize=\[l"
    ):
        fitted(side(), other)
    weights, start = fitted(side(), other, fresh=["label.weight"])
    assert "label.weight" not in start.taken
    assert start.lines[-1] == "made anew, as train.init_fresh says: label.weight"
    weights, start = fitted(side(), other, resize=["label.weight"])
    taken = start.taken["label.weight"]
    assert taken.mask[:, 0].tolist() == [True, False, True, False, True] and taken.mask.all(1).sum() == 3
    assert torch.equal(taken.value[[0, 2, 4]], weights["label.weight"][[1, 2, 3]])
    assert "label.weight: rows of 2 classes by their names, 2 made anew, as train.init_resize says" in start.lines
    with pytest.raises(InputError, match="knows no class dog, eel, fox"):  # as many are not the same
        fitted(side(), side(classes=("dog", "eel", "fox")))


@pytest.mark.parametrize("model", [IN_CONTEXT, DIT, replace(DIT, positions="rope")])
def test_fixed_positions_are_made_for_the_new_grid(model):
    weights, start = fitted(side(model), side(model, shape=(4, 8, 12)))
    assert start.taken.keys() == weights.keys()
    assert start.lines[1:] == [f"fixed positions ({model.positions}) made for 4×6 tokens instead of 2×2"]


def keys_cubic(x):
    """Keys' cubic convolution kernel with a = -3/4."""
    x = np.abs(x)
    near = 1.25 * x**3 - 2.25 * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def resampling(old, new):
    """[new, old]: cubic convolution at the centres of the new cells, edges repeated."""
    out = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            out[i, min(max(tap, 0), old - 1)] += keys_cubic(centre - tap)
    return out


def test_learned_positions_are_resized_only_on_request():
    theirs, ours = side(LEARNED, shape=(4, 8, 8)), side(LEARNED, shape=(4, 12, 16))
    with pytest.raises(InputError, match=r"position is for 4×4 tokens there, 6×8 here.*init_resize=\[position\]"):
        fitted(theirs, ours)
    weights, start = fitted(theirs, ours, resize=["position"])
    taken, table = start.taken["position"], weights["position"]
    assert taken.mask.all() and torch.equal(taken.value[:2], table[:2])
    grid = np.einsum("rR,cC,RCd->rcd", resampling(4, 6), resampling(4, 8), table[2:].view(4, 4, -1).double().numpy())
    torch.testing.assert_close(taken.value[2:].double().view(6, 8, -1), torch.from_numpy(grid), rtol=0, atol=1e-5)
    assert "position: resized from 4×4 to 6×8 tokens, as train.init_resize says" in start.lines
    with pytest.raises(InputError, match="position is for 2×8 tokens there, 4×4 here"):  # as many are not the same
        fitted(side(LEARNED, shape=(4, 4, 16)), side(LEARNED, shape=(4, 8, 8)))


def test_captions_are_added_to_a_class_model():
    both = replace(LEARNED, condition_on="class_and_text")
    theirs, ours = side(LEARNED), side(both, text=BYTES)
    with pytest.raises(
        InputError, match=r"position has 2 tokens before.*text.position is not.*init_fresh=\[position,text"
    ):
        fitted(theirs, ours)
    weights, start = fitted(theirs, ours, fresh=["text"], resize=["position"])
    assert shapes_of(ours).keys() - start.taken.keys() == {"text.token.weight", "text.position"}
    taken = start.taken["position"]
    assert taken.mask[:, 0].tolist() == [True, True, False, False, False, True, True, True, True]
    assert torch.equal(taken.value[[0, 1, 5, 6, 7, 8]], weights["position"])
    assert "position: resized from 2×2 to 2×2 tokens, those of 3 tokens before them made anew, as" in start.lines[1]
    weights, start = fitted(side(), side(replace(IN_CONTEXT, condition_on="class_and_text"), text=BYTES), ["text"])
    assert start.taken.keys() == weights.keys()


def test_what_only_the_source_has_is_left_out_only_on_request():
    text = replace(IN_CONTEXT, condition_on="text")
    both = side(replace(IN_CONTEXT, condition_on="class_and_text"), text=BYTES)
    with pytest.raises(InputError, match=r"label.weight is only there; .*init_fresh=\[label\] does without"):
        fitted(both, side(text, text=BYTES))
    _, start = fitted(both, side(text, text=BYTES), fresh=["label"])
    assert start.lines[-1] == "left out, as train.init_fresh says: label.weight"
    unnormed = replace(IN_CONTEXT, qk_norm=False)
    with pytest.raises(InputError, match="blocks.0.attention.q_norm.weight is only there"):
        fitted(side(), side(unnormed))


def test_patches_of_as_many_numbers_are_not_the_same():
    fine, coarse = replace(IN_CONTEXT, patch=1), side(replace(IN_CONTEXT, patch=2), shape=(4, 8, 8))
    with pytest.raises(InputError, match=r"patchify.weight has patches of 4×2×2 numbers there, 16×1×1 here"):
        fitted(coarse, side(fine, shape=(16, 4, 4)))
    _, start = fitted(coarse, side(fine, shape=(16, 4, 4)), fresh=["patchify", "unpatchify"])
    assert "made anew, as train.init_fresh says: patchify.weight, patchify.bias, unpatchify.weight" in start.lines[1]


@pytest.mark.parametrize(
    ("fresh", "resize", "said"),
    [
        (["labels"], [], "train.init_fresh names labels, which neither model has; did you mean label"),
        (["blocks.2"], [], "train.init_fresh names blocks.2"),
        ([], ["patchify.weight"], "train.init_resize=patchify.weight can't be resized; these can: label.weight"),
        ([], ["position"], "train.init_resize=position can't be resized"),
    ],
)
def test_names_of_nothing_are_refused(fresh, resize, said):
    with pytest.raises(InputError, match=re.escape(said)):
        fitted(side(), side(), fresh, resize)


def test_lists_without_a_source_are_refused():
    for key in ("init_fresh", "init_resize"):
        with pytest.raises(InputError, match=f"train.{key}=.* belongs to train.init_from"):
            from_dict(TrainJob, {"run_dir": "x", "data": {"path": "y"}, "train": {key: ["label"]}})


def test_what_no_parameter_shows_is_said():
    model = replace(IN_CONTEXT, time="steps", qk_norm=False, mlp="gelu", attention="sdpa")
    there = source_of(side(model, text=BYTES))
    now = {"model": to_dict(replace(model, heads=4, time="continuous", mlp="gelu_erf", attention="auto"))}
    config = from_dict(TrainJob, {"run_dir": "x", "data": {"path": "y"}, "objective": {"prediction": "v"}} | now)
    lines = list(describe_differences(there, config, side(autoencoder="b").spec))
    said = [("objective.prediction", "flow", "v"), ("model.heads", "2", "4"), ("model.mlp", "gelu", "gelu_erf")]
    said += [("model.time", "steps", "continuous")]
    assert lines[:-1] == [
        f"the weights of train.init_from were trained with {k}={a}, and go on here with {b}" for k, a, b in said
    ]
    assert "were trained on latents of autoencoder a, and go on here with those of b" in lines[-1]


def test_a_run_a_checkpoint_and_an_exported_model_are_the_same_source(root, tmp_path):
    assert main(["export", str(root / "first"), f"--to={tmp_path}/model"]) == 0
    paths = [root / "first", resolve(root / "first"), tmp_path / "model"]
    first, *others = [Source.read(path) for path in paths]
    for other in others:
        assert (other.side, other.objective, other.samples_seen) == (first.side, first.objective, 8)
        assert all(torch.equal(other.weights[k], v) for k, v in first.weights.items())


# ------------------------------------------------------------------------------------------------- in real processes


def started_case(world: World, stage: int, source: str, data: str) -> dict[str, str]:
    """A hash of each parameter that a run of other classes and a larger grid starts with, in weights and averages."""
    spec = open_shards(Path(data)).manifest.spec
    train = {"init_from": source, "init_fresh": ["unpatchify"], "init_resize": ["label.weight", "position"]}
    model = to_dict(replace(LEARNED, width=32))
    config = from_dict(TrainJob, {"run_dir": "x", "data": {"path": data}, "model": model, "train": train, "seed": 3})
    denoiser = build(config.model, spec.latent_shape, len(spec.classes), config.seed)
    with torch.no_grad():
        denoiser.unpatchify.weight.add_(1)  # what is fresh is recognised by it
    engine = Engine(denoiser, EngineConfig(stage), OptimizerConfig(), world, 1)
    masters = [f.master for f in engine.partition.owned]
    ema = ShardedEMA(EMAConfig(), masters)
    start_from(Path(source), config, spec, engine.partition, ema)
    weights, averages = gather(engine.partition, masters), gather(engine.partition, ema.tensors["ema"])
    assert all(torch.equal(weights[k], averages[k]) for k in weights)
    assert (weights["unpatchify.weight"] == 1).all()
    initial = build(config.model, spec.latent_shape, len(spec.classes), config.seed)
    same_row = (weights["label.weight"] == initial.label.weight).all(1)
    assert same_row.tolist() == [False, True, False, False], "the new class's row alone is what it was"
    return {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in weights.items()}


def test_any_world_and_stage_starts_with_the_same_weights(pool, root, tmp_path):
    write_shards(tmp_path / "small", [9], classes=("ant", "bee", "cat"))
    write_shards(tmp_path / "large", [9], classes=("bee", "dog", "cat"), latent_shape=(4, 4, 8))
    done = train(tmp_path, "there", 8, f"data.path={tmp_path}/small", "model.positions=learned")
    assert done.returncode == 0, done.stderr
    arguments = {"source": str(tmp_path / "there"), "data": str(tmp_path / "large")}
    alone = pool(1).run(started_case, stage=0, **arguments)
    for size, stage in ((1, 2), (2, 1), (3, 3)):
        assert pool(size).run(started_case, stage=stage, **arguments) == alone, (size, stage)


PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"


def test_the_commands_of_the_docs_fine_tune_the_demo(tmp_path):
    """The page's own lines, shortened: five of the ten classes, from a run on all."""
    page = PAGE.read_text().partition("## Fine-tuning")[2]
    encode, tune = (shlex.split(line) for line in re.findall(r"^(ldt \w+ .+)$", page, re.M)[:2])
    (tmp_path / "configs").symlink_to(PAGE.parents[1] / "configs")
    small = ["model={width: 32, depth: 2, heads: 2, inner_head: 1}", "train.total_samples=64", "train.global_batch=32"]
    small += ["optimizer.warmup_samples=32", "log={every_samples: 32, samples_every_samples: 0}"]
    small += ["log.validation_every_samples=0"]

    def ran(*words):
        done = forked.run("-m", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    write_shards(tmp_path / "data/fashion_mnist", [64], latent_shape=(4, 8, 8), classes=FashionMNIST().classes)
    ran("ldt", "train", "configs/fashion_mnist.yaml", *small)
    ran(*encode, "batch=500")
    spec = open_shards(tmp_path / "data/five").manifest.spec
    assert spec.classes == ["Sandal", "Sneaker", "Boot", "Bag", "Dress"] and sum(spec.class_counts) == 4750
    said = ran(*tune, *small)
    assert "label.weight: rows of 5 classes by their names, 5 classes left out" in said
    assert load_denoiser(tmp_path / "runs/five").spec.classes == spec.classes
