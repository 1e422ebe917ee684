"""The DiT arm of the study learns as DiT does: `ldt train` beside diffusers' network and schedule under torch's AdamW.

From the same weights (by `ldt import`), on the same batches, steps and noise. The other side is in float64, so that
what differs is our rounding.
"""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from dit_layout import dit_layout, in_diffusers
from run_data import make_autoencoder
from shard_data import CLASSES, make_loader, write_shards
from training_cases import config_case

from ldt.cli import main
from ldt.data.shards import open_shards
from ldt.log import read_jsonl
from ldt.nn.embedding import sincos_2d

ARM = Path(__file__).parents[1] / "configs" / "study" / "dit.yaml"
WIDTH, DEPTH, HEADS = 32, 2, 4
BATCH, STEPS, WARMUP = 32, 100, 20
LR, FINAL_LR = 2e-3, 1e-5
TOLERANCE = 2e-6
"""Relative, of every one of the losses; seen were 3e-7."""


@pytest.fixture(scope="module")
def weights():
    """A DiT of one output per channel, as its file would hold it: random, with small gates as at its start."""
    g = torch.Generator().manual_seed(0)
    shapes = dit_layout(WIDTH, DEPTH, len(CLASSES), rows=4)
    shapes |= {"final_layer.linear.weight": (16, WIDTH), "final_layer.linear.bias": (16,)}
    scale = {name: 0.02 if "adaLN" in name or "final" in name else 0.15 for name in shapes}
    tensors = {name: scale[name] * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return tensors | {"pos_embed": sincos_2d(WIDTH, 4, 4)[None]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [500, 300], latent_shape=(4, 8, 8))
    return path


def learning_rate(seen):
    """Linear warm-up, then half a cosine."""
    warm, total = WARMUP * BATCH, STEPS * BATCH
    if seen < warm:
        return LR * seen / warm
    return FINAL_LR + (LR - FINAL_LR) * (1 + math.cos(math.pi * (seen - warm) / (total - warm))) / 2


def their_losses(weights, data):
    """Ho's loss of diffusers' DiT, step by step; its blocks share the embeddings of time and class, as DiT's do."""
    model = in_diffusers(weights, HEADS).double()
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed, kept = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    with make_loader(
        open_shards(data), batch=BATCH, seed=0, streams=16, window=4096, label_drop=0.1, threads=1
    ) as loader:
        steps = loader.steps()
        for i in range(STEPS):
            (batch,) = next(steps).micro_batches
            step_B = (1000 * batch.uniform_B.double()).long()
            noise_BCHW = batch.noise_BCHW.double()
            noisy_BCHW = scheduler.add_noise(batch.latent_BCHW.double(), noise_BCHW, step_B)
            guess_BCHW = model(noisy_BCHW, timestep=step_B, class_labels=batch.label_B).sample
            loss = (guess_BCHW - noise_BCHW).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(BATCH * (i + 1))
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_the_dit_arm_learns_as_dit_does(pool, weights, data, tmp_path):
    make_autoencoder(tmp_path / "vae")
    torch.save(weights, tmp_path / "dit.pt")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    words = [f"to={tmp_path}/model", f"autoencoder={tmp_path}/vae", f"class_names={tmp_path}/names.txt"]
    assert main(["import", str(tmp_path / "dit.pt"), *words, f"heads={HEADS}", "kind=dit"]) == 0
    settings = [f"run_dir={tmp_path}/run", f"data.path={data}", f"train.init_from={tmp_path}/model"]
    settings += [f"model={{width: {WIDTH}, depth: {DEPTH}, heads: {HEADS}}}", f"train.total_samples={STEPS * BATCH}"]
    settings += [f"optimizer.warmup_samples={WARMUP * BATCH}", f"log={{every_samples: {BATCH}}}"]
    settings += ["log.validation_every_samples=0", "checkpoint.every_samples=0"]
    pool(1).run(config_case, path=str(ARM), settings=settings)
    ours = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    theirs = their_losses(weights, data)
    assert len(ours) == STEPS and sum(theirs[-20:]) < 0.9 * sum(theirs[:20])
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
