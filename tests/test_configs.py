"""Every shipped training config loads, is what its header says it is, and dry-runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from ldt import config as configs
from ldt.cli import main
from ldt.encoding.config import EncodeJob
from ldt.models.autoencoder import EMBEDDED_REPRESENTATION
from ldt.nn.build import build, parameter_count
from ldt.nn.config import ModelConfig
from ldt.nn.sizes import dit, dit_dh, dit_of, flops, uvit
from ldt.training.config import TrainJob

ROOT = Path(__file__).parents[1] / "configs"
DEMO = ROOT / "fashion_mnist.yaml"
TRAINING = sorted(p for d in ("imagenet256", "imagenet512") for p in (ROOT / d).glob("*.yaml"))
MILLIONS = {
    "imagenet256/dcae_f32_xl": 674.9,
    "imagenet256/dit_s2": 32.9,
    "imagenet256/dit_xl2": 674.8,
    "imagenet256/flux2_xl": 675.1,
    "imagenet256/ldt_transformer": 330.3,
    "imagenet256/rae_dinov2_xl": 838.1,
    "imagenet256/sit_xl2": 674.8,
    "imagenet256/unet_ldm8": 395.5,
    "imagenet256/uvit_h2": 500.8,
    "imagenet512/dit_xl2": 674.8,
    "imagenet512/ldt_transformer": 330.3,
    "imagenet512/sit_xl2": 674.8,
    "imagenet512/uvit_h4": 500.9,
}


LATENTS = {  # of those that are not 4 channels at an eighth of the size
    "imagenet256/dcae_f32_xl": (32, 8, 8),
    "imagenet256/flux2_xl": (32, 32, 32),
    "imagenet256/rae_dinov2_xl": (768, 16, 16),
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_it_has_the_parameters_that_its_header_tells(path):
    config = configs.load(TrainJob, path)
    side = int(path.parent.name.removeprefix("imagenet")) // 8
    with torch.device("meta"):
        model = build(config.model, LATENTS.get(name_of(path), (4, side, side)), 1000, seed=0)
    assert parameter_count(model) / 1e6 == pytest.approx(MILLIONS[name_of(path)], abs=0.1)
    header = path.read_text().split("run_dir:")[0]
    assert f"{MILLIONS[name_of(path)]:.0f} M parameters" in header or "395 M parameters" in header
    assert "theirs, not reproduced here" in header and f"ldt train configs/{name_of(path)}.yaml" in header
    assert f"ldt encode configs/encode/{path.parent.name}.yaml" in header


@pytest.mark.parametrize("name", LATENTS)
def test_its_cost_is_what_the_plan_says(name, capsys):
    """The header quotes a command and its hours; the data that it encodes are those it trains on."""
    header = " ".join(line.removeprefix("#").strip() for line in (ROOT / f"{name}.yaml").read_text().splitlines())
    command, hours = re.search(r"ldt (plan .+?) says ([\d.]+) h", header).groups()
    assert main([word.replace("configs/", f"{ROOT}/") for word in command.split()]) == 0
    said = capsys.readouterr().out
    assert f"time           {hours} h" in said and "warning" not in said
    assert f"output={configs.load(TrainJob, ROOT / f'{name}.yaml').data.path}" in header


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_it_dry_runs(path, capsys):
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"run_dir: runs/{name_of(path)}" in capsys.readouterr().out


def test_reproductions_are_the_published_architectures():
    def model(name):
        shape = configs.load(TrainJob, ROOT / f"{name}.yaml").model
        return dataclasses.replace(shape, activation_checkpointing=False)

    for size in ("256", "512"):
        assert model(f"imagenet{size}/dit_xl2") == dataclasses.replace(dit("XL/2"), learned_sigma=False)
        flow = dataclasses.replace(dit("XL/2"), learned_sigma=False, time="continuous")
        assert model(f"imagenet{size}/sit_xl2") == flow
    assert model("imagenet256/rae_dinov2_xl") == dit_dh("XL")
    assert model("imagenet256/dcae_f32_xl") == dataclasses.replace(dit("XL/2"), patch=1, learned_sigma=False)
    assert model("imagenet256/dit_s2") == dataclasses.replace(dit("S/2"), learned_sigma=False)
    assert model("imagenet256/uvit_h2") == dataclasses.replace(uvit("H/2"), output_convolution=False)
    assert model("imagenet512/uvit_h4") == dataclasses.replace(uvit("H/4"), output_convolution=False)
    assert model("imagenet256/unet_ldm8") == ModelConfig(name="unet", time="steps")


@pytest.mark.parametrize("size", [256, 512])
def test_their_data_are_encoded_by_a_config(size):
    encode = configs.load(EncodeJob, ROOT / "encode" / f"imagenet{size}.yaml")
    assert encode.output == f"data/imagenet{size}" and encode.images.size == size


def test_the_study_is_matched():
    """The UNet arms have the Transformer's parameters and its cost; all else is the same."""
    arms = {n: configs.load(TrainJob, ROOT / "study" / f"{n}.yaml") for n in ("transformer", "unet", "unet_flops")}
    with torch.device("meta"):
        parameters = {n: parameter_count(build(c.model, (4, 8, 8), 10, seed=0)) for n, c in arms.items()}
    cost = {n: flops(c.model, (4, 8, 8)) for n, c in arms.items()}
    assert parameters["unet"] / parameters["transformer"] == pytest.approx(1, abs=0.03)
    assert cost["unet_flops"] / cost["transformer"] == pytest.approx(1, abs=0.03)
    rest = [dataclasses.replace(c, model=ModelConfig(), run_dir="") for c in arms.values()]
    assert rest[0] == rest[1] == rest[2]


@pytest.mark.parametrize("path", [*(ROOT / "study").glob("*.yaml"), ROOT / "recipes" / "small.yaml", DEMO], ids=name_of)
def test_validation_losses_compare_between_the_arms(path):
    log = configs.load(TrainJob, path).log
    assert log.validation_times == 8 and log.validation_every_samples == 6000


def test_arms_over_the_base_change_what_they_are_about_and_nothing_else():
    base = configs.load(TrainJob, ROOT / "study" / "transformer.yaml")
    said = {
        "mean_flow": ["model.time=unit", "model.interval=true", "objective.mean_flow=0.25", "evaluate.steps=2",
                      "evaluate.sampler=mean_flow"],
        "mean_flow_guided": ["model.time=unit", "model.interval=true", "objective.mean_flow=0.25",
                             "objective.mean_flow_guidance=1.5", "evaluate.steps=1", "evaluate.sampler=mean_flow",
                             "evaluate.guidance=1.0"],
        "align": ["data.path=data/fashion_mnist_target", "align={weight: 0.5, block: 2, until_samples: 24000}"],
        "reg": ["data.path=data/fashion_mnist_target",
                "align={weight: 0.5, block: 2, until_samples: 24000, token_weight: 0.03}"],
        "inner_head": ["model.inner_head=2", "evaluate.guidance_inner=1.25"],
    }  # fmt: skip
    for arm, changes in said.items():
        path = ROOT / "study" / f"{arm}.yaml"
        expected = configs.load(TrainJob, ROOT / "study" / "transformer.yaml", [*changes, f"run_dir=runs/study/{arm}"])
        assert configs.load(TrainJob, path) == expected != base, arm


def test_the_representation_arm_is_the_first_record_on_other_latents_at_its_cost():
    """As many tokens, blocks and samples; what the header says of its cost is what `ldt plan` counts."""
    path = ROOT / "study" / "representation.yaml"
    recorded = ROOT.parent / "records" / "fashion_mnist-2026-11-27" / "config.yaml"
    encode = configs.load(EncodeJob, ROOT / "encode" / "fashion_mnist_representation.yaml")
    changes = ["model.patch=1", "objective.shift_base=256", f"data.path={encode.output}", "evaluate.checkpoint=all"]
    arm, demo = configs.load(TrainJob, path), configs.load(TrainJob, recorded, changes)
    for part in ("seed", "data", "model", "objective", "align", "train", "optimizer", "ema", "evaluate"):
        assert getattr(arm, part) == getattr(demo, part), part
    assert encode.autoencoder == EMBEDDED_REPRESENTATION and encode.whitening == "element"
    shapes = [(112, 4, 4), (4, 8, 8)]
    models = [arm.model, configs.load(TrainJob, recorded).model]
    cost = [flops(model, shape) / 1e6 for model, shape in zip(models, shapes, strict=True)]
    assert cost[0] / cost[1] == pytest.approx(1, abs=0.02)
    header = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines())
    assert f"{cost[0]:.1f} MFLOP an image forward, the demo {cost[1]:.1f}" in header


def test_the_tuned_dit_is_dit_but_for_its_rate_and_batch():
    config = configs.load(TrainJob, ROOT / "study" / "dit.yaml")
    shape = dataclasses.replace(dit_of(192, 6, 6, 2), learned_sigma=False)
    published = configs.load(TrainJob, ROOT / "imagenet256" / "dit_s2.yaml")
    assert config.model == shape and config.objective == published.objective
    assert (config.optimizer.lr, config.optimizer.decay, config.train.global_batch) == (2e-3, "cosine", 32)


def test_the_imagenet_recipe_costs_what_its_header_says(capsys):
    path = ROOT / "recipes" / "imagenet256.yaml"
    header = " ".join(line.removeprefix("#").strip() for line in path.read_text().split("run_dir:")[0].splitlines())
    command, hours = re.search(r"ldt (plan .+?) says ([\d.]+) h", header).groups()
    assert main([word.replace("configs/", f"{ROOT}/") for word in command.split()]) == 0
    out = capsys.readouterr().out
    assert f"time           {hours} h" in out and "warning" not in out
    assert "842 M parameters" in header and "841.7 M parameters" in out and "not reproduced here" in header


@pytest.mark.parametrize("path", [*(ROOT / "study").glob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")], ids=name_of)
def test_arms_and_recipes_dry_run(path, capsys):
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"run_dir: runs/{name_of(path)}" in capsys.readouterr().out


def test_the_text_example_loads(capsys):
    config = configs.load(TrainJob, ROOT / "text" / "emoji.yaml")
    assert config.model.condition_on == "class_and_text"
    encode = configs.load(EncodeJob, ROOT / "encode" / "emoji.yaml")
    assert encode.output == config.data.path and encode.text.encoder == "bytes"
    assert main(["train", str(ROOT / "text" / "emoji.yaml"), "--dry-run"]) == 0
    assert "condition_on: class_and_text" in capsys.readouterr().out


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_imagenet_sizes_are_set_for_gpus(path):
    """Compiled blocks, sharded optimizers, training and sampling in bf16."""
    config = configs.load(TrainJob, path, [])
    assert config.engine.zero_stage in (1, 2) and config.engine.precision == config.evaluate.precision == "bf16"
    assert config.engine.compile == (config.model.name == "transformer")
