"""Doors to DiT and diffusers, against diffusers' own DiTTransformer2DModel and DiTPipeline."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from dit_weights import DEPTH, HEADS, WIDTH, dit_layout, in_diffusers
from run_data import make_autoencoder, randomised

from ldt.checkpoint.load import Loaded, load_denoiser
from ldt.cli import main
from ldt.convert.diffusers_dit import write_pipeline
from ldt.convert.dit import convert, model_config
from ldt.convert.weights import read
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig, SamplerConfig
from ldt.diffusion.guidance import as_predict
from ldt.diffusion.objectives import Objective
from ldt.diffusion.samplers import SAMPLERS
from ldt.diffusion.schedules import time_of_step
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import HeadConfig
from ldt.nn.embedding import sincos_2d
from ldt.nn.sizes import dit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DiTPipeline

CLASSES = 7


@pytest.fixture
def theirs():
    g = torch.Generator().manual_seed(0)
    shapes = dit_layout(WIDTH, DEPTH, CLASSES, rows=4)
    tensors = {name: 0.2 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return tensors | {"pos_embed": sincos_2d(WIDTH, 4, 4)[None]}


def test_dit_weights_give_what_diffusers_gives(theirs):
    config = model_config(theirs, HEADS)
    ours = build(config, (4, 8, 8), CLASSES, seed=1)
    left_over = ours.load_state_dict(convert(theirs, config), strict=False)
    assert left_over.missing_keys == ["position"] and not left_over.unexpected_keys
    g = torch.Generator().manual_seed(1)
    x, k, label = torch.randn(3, 4, 8, 8, generator=g).double(), torch.tensor([0, 437, 999]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        got = ours.double()(x, time_of_step(k), Condition(label))
        expected = in_diffusers(theirs).double()(x, timestep=k, class_labels=label).sample
    assert expected.shape[1] == 8 and got.shape[1] == 4
    torch.testing.assert_close(got, expected[:, :4], rtol=1e-9, atol=1e-9)


def test_the_public_layout_is_dit_xl_2():
    """Every name and shape of DiT-XL-2-256x256.pt has its place, none is left over."""
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in dit_layout(1152, 28, 1000, rows=16).items()}
        config = model_config(theirs)
        assert config == dit("XL/2")
        shapes = build(config, (4, 32, 32), 1000, seed=0).state_dict()
        ours = convert(theirs, config)
    assert {k: v.shape for k, v in ours.items()} | {"position": shapes["position"].shape} == {
        k: v.shape for k, v in shapes.items()
    }


def test_import_makes_a_model_that_samples(theirs, tmp_path, capsys):
    make_autoencoder(tmp_path / "vae")
    torch.save({"ema": theirs, "model": {}}, tmp_path / "dit.pt")
    settings = [f"to={tmp_path}/model", f"autoencoder={tmp_path}/vae", f"heads={HEADS}"]
    assert main(["import", str(tmp_path / "dit.pt"), *settings]) == 0
    loaded = load_denoiser(tmp_path / "model")
    assert [*loaded.spec.latent_shape] == [4, 8, 8] and loaded.spec.std_C == [1 / 0.18215] * 4
    assert loaded.objective.config.schedule == "ddpm" and loaded.config["model"]["learned_sigma"]
    assert main(["sample", str(tmp_path / "model"), "images=4", "steps=2", "block=4", "--quiet"]) == 0
    assert main(["import", str(tmp_path / "dit.pt"), *settings]) == 2
    assert "exists; give a directory that does not" in capsys.readouterr().err


def test_other_files_are_refused(theirs, tmp_path, capsys):
    def refused(content, *settings):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError) as error:
            w = read(tmp_path / "x.pt")
            convert(w, model_config(w, *settings))
        return str(error.value)

    assert "are no DiT's: there is no x_embedder.proj.weight" in refused({"a": torch.zeros(1)})
    assert "is none of the published ones; give its heads=" in refused(theirs)
    assert "extra.weight is not part of a DiT" in refused(theirs | {"extra.weight": torch.zeros(1)}, HEADS)
    assert "not the fixed sine-cosine grid" in refused(theirs | {"pos_embed": torch.ones(1, 16, WIDTH)}, HEADS)
    assert "can't be read as plain tensors" in refused({"args": np.random.default_rng(0)})
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.pt")
    make_autoencoder(tmp_path / "vae")
    torch.save(theirs, tmp_path / "x.pt")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    command = ["import", str(tmp_path / "x.pt"), f"to={tmp_path}/m", f"autoencoder={tmp_path}/vae", f"heads={HEADS}"]
    command.append("kind=dit")
    assert main([*command, f"class_names={tmp_path}/names.txt"]) == 2
    assert "has 2 lines, the weights know 7 classes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- out to diffusers


@pytest.fixture
def loaded(tmp_path):
    """An adaLN-Zero eps model on the discrete schedule, of random weights throughout."""
    autoencoder = make_autoencoder(tmp_path / "vae")
    config = dataclasses.replace(
        dit("S/2"), width=WIDTH, depth=DEPTH, heads=HEADS, time_frequencies="diffusers", learned_sigma=False
    )
    spec = LatentSpec(
        latent_shape=(4, 8, 8),
        classes=["ant", "bee", "cat"],
        mean_C=[0.3, -0.2, 0.0, 0.5],
        std_C=[0.5, 2.0, 1.0, 1.5],
        autoencoder=str(tmp_path / "vae"),
        autoencoder_hash=autoencoder.hash,
        image_size=32,
        image_channels=1,
    )
    objective = Objective(ObjectiveConfig(prediction="eps", schedule="ddpm", timesteps="uniform"))
    denoiser = randomised(build(config, spec.latent_shape, 3, seed=0)).eval()
    return Loaded(denoiser, objective, spec, {}, 0, tmp_path, "test")


def test_diffusers_pipeline_draws_the_same_images(loaded, tmp_path):
    """The whole way: the folder loads, its network agrees, and guided DDIM ends in the same pixels as ours."""
    write_pipeline(loaded, tmp_path / "pipeline")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["cat"]) == [2]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for k in (0, 500, 999):
            t, label = time_of_step(torch.tensor([k, k])).float(), torch.tensor([1, 3])
            expected = loaded.denoiser(x, t, Condition(label))
            got = pipeline.transformer(x, timestep=torch.tensor([k, k]), class_labels=torch.tensor([1, 1000])).sample
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        theirs = pipeline([1, 2], 1.5, torch.Generator().manual_seed(3), 10, output_type="np").images
        times = [*time_of_step(pipeline.scheduler.timesteps).tolist(), 0.0]
        assert len(times) == 11
        predict = as_predict(
            loaded.denoiser, loaded.objective, Condition(torch.tensor([1, 2])), 3, SamplerConfig(guidance=1.5)
        )
        latent = SAMPLERS["ddim"](predict, loaded.objective.schedule, x, times, lambda step: x)
        latent = latent * torch.tensor(loaded.spec.std_C)[:, None, None]
        latent = latent + torch.tensor(loaded.spec.mean_C)[:, None, None]
        autoencoder = make_autoencoder(tmp_path / "vae")
        ours = autoencoder.decode(latent).numpy()
    assert ours.std() > 5
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1


def test_the_exported_autoencoder_whitens_what_it_encodes(loaded, tmp_path):
    write_pipeline(loaded, tmp_path / "pipeline")
    vae = DiTPipeline.from_pretrained(tmp_path / "pipeline").vae
    image = torch.randint(0, 256, (2, 32, 32, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = make_autoencoder(tmp_path / "vae").encode(image)
    with torch.no_grad():
        posterior = vae.encode(image.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (loaded.spec.mean_C, loaded.spec.std_C))
    torch.testing.assert_close(posterior.mean, (mean - mean_C11) / std_C11, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.std, std / std_C11, rtol=1e-4, atol=1e-5)


def test_what_diffusers_cannot_hold_is_refused(loaded, tmp_path):
    for change, message in (
        ({"qk_norm": True}, "model.qk_norm=True would have to be False"),
        ({"size_conditioning": True}, "model.size_conditioning=True would have to be False"),
        ({"time_frequencies": "dit"}, "model.time_frequencies=dit would have to be diffusers"),
        ({"mlp_ratio": 2.0}, "model.mlp_ratio=4"),
        ({"head": HeadConfig(1, 32, 2)}, "it has a wide head"),
    ):
        config = dataclasses.replace(loaded.denoiser.config, **change)
        other = dataclasses.replace(loaded, denoiser=build(config, (4, 8, 8), 3, seed=0))
        with pytest.raises(InputError, match=message):
            write_pipeline(other, tmp_path / "x")
    flow = dataclasses.replace(loaded, objective=Objective(ObjectiveConfig()))
    with pytest.raises(InputError, match="predicts eps on a discrete schedule, not flow on rectified_flow"):
        write_pipeline(flow, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_command(theirs, tmp_path, capsys):
    """An imported DiT has DiT's frequencies: refused with the reason; with diffusers' ones it goes out."""
    make_autoencoder(tmp_path / "vae")
    torch.save(theirs, tmp_path / "dit.pt")
    settings = [f"to={tmp_path}/model", f"autoencoder={tmp_path}/vae", f"heads={HEADS}"]
    assert main(["import", str(tmp_path / "dit.pt"), *settings]) == 0
    command = ["export", str(tmp_path / "model"), "--format", "diffusers", "--to", str(tmp_path / "pipeline")]
    assert main(command) == 2
    assert "model.time_frequencies=dit would have to be diffusers" in capsys.readouterr().err
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    facts["config"]["model"]["time_frequencies"] = "diffusers"
    (tmp_path / "model" / "model.json").write_text(json.dumps(facts))
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'pipeline'}\n")
    with pytest.raises(InputError, match="as safetensors first"):
        from ldt.commands.export import ExportJob

        ExportJob(run="x", to="y", ema_width=0.1, format="diffusers")
