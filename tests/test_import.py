"""Weights of SiT, REPA, LightningDiT and U-ViT: random ones, against the papers' formulas written out here."""

import argparse
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dit_weights import dit_layout
from run_data import make_autoencoder, make_images

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.convert.kinds import CONVERTERS, kind_of
from ldt.convert.uvit import model_config
from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.embedding import sincos_2d

WIDTH, DEPTH, HEADS, CLASSES, ROWS = 48, 3, 3, 7, 4
HEAD = WIDTH // HEADS
SIDE = 2 * ROWS
LABELS = torch.tensor([0, 6, 7])
KINDS = ["sit", "sit+sigma", "repa", "lightningdit", "lightningdit+qknorm", "lightningdit+plain", "uvit", "uvit+conv"]

# ------------------------------------------------------------------------------------------------ files as theirs are


def random_like(shapes):
    g = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def linear(shapes, name, out, inner, bias=True):
    shapes[f"{name}.weight"] = (out, inner)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def dit_shapes(output):
    shapes = dit_layout(WIDTH, DEPTH, CLASSES, ROWS)
    linear(shapes, "final_layer.linear", 4 * output, WIDTH)
    return shapes


def sit(sigma):
    return random_like(dit_shapes(8 if sigma else 4)) | {"pos_embed": sincos_2d(WIDTH, ROWS, ROWS)[None]}


def repa():
    shapes = dit_shapes(4)
    for i, (a, b) in enumerate([(WIDTH, 64), (64, 64), (64, 24)]):
        linear(shapes, f"projectors.0.{2 * i}", b, a)
    return random_like(shapes) | {"pos_embed": sincos_2d(WIDTH, ROWS, ROWS)[None]}


def angles():
    """LightningDiT's: frequencies 10⁴^(−2i/(E/2)) for the row, then for the column, each twice in a row."""
    frequency = 10_000.0 ** (-torch.arange(0, HEAD // 2, 2, dtype=torch.float64) / (HEAD // 2))
    one = (torch.arange(ROWS)[:, None] * frequency).repeat_interleave(2, dim=1)
    rows, columns = one[:, None].expand(-1, ROWS, -1), one[None].expand(ROWS, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(ROWS * ROWS, HEAD)


def lightningdit(qk_norm=False, shifts=True, hidden=int(2 / 3 * 4 * WIDTH) + 1):
    shapes = dit_shapes(4)
    for i in range(DEPTH):
        for name in [n for n in shapes if re.match(rf"blocks\.{i}\.mlp", n)]:
            del shapes[name]
        linear(shapes, f"blocks.{i}.mlp.w12", 2 * hidden, WIDTH)
        linear(shapes, f"blocks.{i}.mlp.w3", WIDTH, hidden)
        linear(shapes, f"blocks.{i}.adaLN_modulation.1", (6 if shifts else 4) * WIDTH, WIDTH)
        shapes |= {f"blocks.{i}.norm1.weight": (WIDTH,), f"blocks.{i}.norm2.weight": (WIDTH,)}
        if qk_norm:
            shapes |= {f"blocks.{i}.attn.q_norm.weight": (HEAD,), f"blocks.{i}.attn.k_norm.weight": (HEAD,)}
    w = random_like(shapes | {"final_layer.norm_final.weight": (WIDTH,)})
    rotary = {"feat_rope.freqs_cos": angles().cos().float(), "feat_rope.freqs_sin": angles().sin().float()}
    return w | rotary | {"pos_embed": sincos_2d(WIDTH, ROWS, ROWS)[None]}


def uvit_shapes(width, depth, classes, rows, convolution, channels=4, patch=2):
    shapes = {"pos_embed": (1, 2 + rows * rows, width), "label_emb.weight": (classes + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    half = depth // 2
    for block in [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        linear(shapes, f"{block}.attn.qkv", 3 * width, width, bias=False)
        linear(shapes, f"{block}.attn.proj", width, width)
        linear(shapes, f"{block}.mlp.fc1", 4 * width, width)
        linear(shapes, f"{block}.mlp.fc2", width, 4 * width)
        if block.startswith("out"):
            linear(shapes, f"{block}.skip_linear", width, 2 * width)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    linear(shapes, "decoder_pred", patch * patch * channels, width)
    if convolution:
        shapes |= {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}
    return shapes


FILES = {
    "sit": lambda: sit(False),
    "sit+sigma": lambda: sit(True),
    "repa": repa,
    "lightningdit": lightningdit,
    "lightningdit+qknorm": lambda: lightningdit(qk_norm=True, shifts=False),
    "lightningdit+plain": lambda: sit(False),
    "uvit": lambda: random_like(uvit_shapes(WIDTH, DEPTH, CLASSES, ROWS, False)),
    "uvit+conv": lambda: random_like(uvit_shapes(WIDTH, DEPTH, CLASSES, ROWS, True)),
}

# ---------------------------------------------------------------------------------------- the networks, in float64


def norm(x, w, name, eps=1e-6):
    """An RMSNorm where it has a weight alone, else a LayerNorm, with or without parameters."""
    if f"{name}.weight" in w and f"{name}.bias" not in w:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w.get(f"{name}.weight"), w.get(f"{name}.bias"), eps)


def affine(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(x, w, name):
    q, k, v = affine(x, w, f"{name}.qkv").reshape(*x.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
    if f"{name}.q_norm.weight" in w:
        q, k = norm(q, w, f"{name}.q_norm"), norm(k, w, f"{name}.k_norm")
    if "feat_rope.freqs_cos" in w:  # neighbours as real and imaginary part
        turn = torch.polar(torch.ones(ROWS**2, HEAD // 2, dtype=torch.float64), angles()[:, ::2])
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for y in (q, k)
        )
    out = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD), dim=-1) @ v
    return affine(out.transpose(1, 2).flatten(2), w, f"{name}.proj")


def waves(t, width):
    frequency = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], dim=1)


def unpatchify(x, channels):
    return x.reshape(-1, ROWS, ROWS, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, SIDE, SIDE)


def adaptive(w, x, t, label):
    """DiT's network and its kin: what it is told is t as it stands."""
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    c = affine(F.silu(affine(waves(t, 256), w, "t_embedder.mlp.0")), w, "t_embedder.mlp.2")
    c = F.silu(c + w["y_embedder.embedding_table.weight"][label])[:, None]
    for i in range(DEPTH):
        b = f"blocks.{i}"
        parts = affine(c, w, f"{b}.adaLN_modulation.1").split(WIDTH, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts if len(parts) == 6 else (0, *parts[:2], 0, *parts[2:])
        h = h + gate1 * attention(norm(h, w, f"{b}.norm1") * (1 + scale1) + shift1, w, f"{b}.attn")
        inner = norm(h, w, f"{b}.norm2") * (1 + scale2) + shift2
        if f"{b}.mlp.w12.weight" in w:
            gate, value = affine(inner, w, f"{b}.mlp.w12").chunk(2, dim=-1)
            h = h + gate2 * affine(F.silu(gate) * value, w, f"{b}.mlp.w3")
        else:
            h = h + gate2 * affine(F.gelu(affine(inner, w, f"{b}.mlp.fc1"), approximate="tanh"), w, f"{b}.mlp.fc2")
    shift, scale = affine(c, w, "final_layer.adaLN_modulation.1").chunk(2, dim=-1)
    out = affine(norm(h, w, "final_layer.norm_final") * (1 + scale) + shift, w, "final_layer.linear")
    return unpatchify(out, out.shape[-1] // 4)[:, :4]


def uvit(w, x, t, label):
    """U-ViT: class and time before the patches, skips from the first half to the second."""
    h = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = torch.cat([w["label_emb.weight"][label][:, None], waves(t, WIDTH)[:, None], h], dim=1) + w["pos_embed"]
    skips = []
    for block in ("in_blocks.0", "mid_block", "out_blocks.0"):
        if block.startswith("out"):
            h = affine(torch.cat([h, skips.pop()], dim=-1), w, f"{block}.skip_linear")
        h = h + attention(norm(h, w, f"{block}.norm1", 1e-5), w, f"{block}.attn")
        inner = norm(h, w, f"{block}.norm2", 1e-5)
        h = h + affine(F.gelu(affine(inner, w, f"{block}.mlp.fc1")), w, f"{block}.mlp.fc2")
        if block.startswith("in"):
            skips.append(h)
    out = unpatchify(affine(norm(h, w, "norm", 1e-5), w, "decoder_pred")[:, 2:], 4)
    if "final_layer.weight" in w:
        out = F.conv2d(out, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return out


def expected(kind, w, x, t, label):
    """What their network predicts, in our words: at our t, and noise minus data where it is a velocity."""
    w = {name: tensor.double() for name, tensor in w.items()}
    if kind == "uvit":
        return uvit(w, x, 1000 * t, label)
    if kind == "repa":
        return adaptive(w, x, t, label)
    return -adaptive(w, x, 1 - t, label)


@pytest.mark.parametrize("name", KINDS)
def test_the_forward_pass_is_theirs(name):
    kind, theirs = name.partition("+")[0], FILES[name]()
    converted = CONVERTERS[kind](theirs, HEADS)
    assert converted.rows == ROWS and all(n.startswith("projectors.0.") for n in converted.left_out)
    ours = build(converted.model, (4, SIDE, SIDE), CLASSES, seed=1)
    missing = ours.load_state_dict(converted.tensors, strict=False)
    fixed = [n for n, p in ours.named_parameters() if not p.requires_grad]
    assert missing.missing_keys == fixed and not missing.unexpected_keys
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, SIDE, SIDE, generator=g).double(), torch.tensor([0.001, 0.437, 1.0])
    with torch.no_grad():
        got = ours.double()(x, t, Condition(LABELS))
        want = expected(kind, theirs, x, t.double(), LABELS)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.std()))


def test_the_public_sizes():
    """Every name and shape has its place, none is left over: U-ViT-H/2, LightningDiT-XL/1 on 32×16×16."""
    with torch.device("meta"):
        theirs = {n: torch.empty(s) for n, s in uvit_shapes(1152, 29, 1000, 16, False).items()}
        config = model_config(theirs)
        assert (config.depth, config.heads, config.mlp_ratio) == (29, 16, 4)
        shapes = build(config, (4, 32, 32), 1000, seed=0).state_dict()
        converted = CONVERTERS["uvit"](theirs, 0)
        assert {k: v.shape for k, v in converted.tensors.items()} == {k: v.shape for k, v in shapes.items()}
        small = dit_layout(1152, 28, 1000, 16, channels=32, patch=1)
        theirs = {n: torch.empty(s) for n, s in small.items() if ".mlp.f" not in n}
        theirs |= {"final_layer.linear.weight": torch.empty(32, 1152), "final_layer.linear.bias": torch.empty(32)}
        for i in range(28):
            theirs |= {f"blocks.{i}.mlp.w12.weight": torch.empty(2 * 3072, 1152)}
            theirs |= {f"blocks.{i}.mlp.w12.bias": torch.empty(2 * 3072)}
            theirs |= {
                f"blocks.{i}.mlp.w3.weight": torch.empty(1152, 3072),
                f"blocks.{i}.mlp.w3.bias": torch.empty(1152),
            }
            theirs |= {f"blocks.{i}.norm{k}.weight": torch.empty(1152) for k in (1, 2)}
        theirs |= {"final_layer.norm_final.weight": torch.empty(1152)}
        theirs |= {f"feat_rope.freqs_{k}": torch.empty(256, 72) for k in ("cos", "sin")}
        converted = CONVERTERS["lightningdit"](theirs, 0)
        model = build(converted.model, (32, 16, 16), 1000, seed=0)
        ours = {k: p.shape for k, p in model.named_parameters() if p.requires_grad}
    assert converted.model.heads == 16 and converted.model.mlp_ratio == 4
    assert {k: v.shape for k, v in converted.tensors.items()} == ours


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("repa", "last.pt", "repa"),
        ("lightningdit", "x.pt", "lightningdit"),
        ("uvit", "x.pth", "uvit"),
        ("sit", "SiT-XL-2-256x256.pt", "sit"),
        ("sit", "DiT-XL-2-256x256.pt", "dit"),
        ("lightningdit+plain", "lightningdit-xl.pt", "lightningdit"),
        ("sit", "transit/unconditional_repa_last.pt", "repa"),
    ],
)
def test_the_kind_is_seen(name, file, kind, tmp_path):
    assert kind_of(FILES[name](), tmp_path / file) == kind


def test_what_can_not_be_told_or_held_is_refused(tmp_path):
    with pytest.raises(InputError, match="may be DiT's or SiT's, .* say kind=dit, kind=sit or kind=repa"):
        kind_of(sit(False), tmp_path / "model.pt")
    with pytest.raises(InputError, match="their names are a.b, … and there is neither"):
        kind_of({"a.b": torch.zeros(1)}, tmp_path / "model.pt")
    normed = sit(False) | {f"blocks.0.attn.q_norm.{k}": torch.ones(HEAD) for k in ("weight", "bias")}
    with pytest.raises(InputError, match="by a LayerNorm, which ldt has not"):
        CONVERTERS["repa"](normed, HEADS)
    with pytest.raises(InputError, match="mlp_time_embed=False"):
        CONVERTERS["uvit"](FILES["uvit"]() | {"time_embed.0.weight": torch.zeros(1)}, HEADS)
    without = {k: v for k, v in FILES["uvit"]().items() if k != "label_emb.weight"}
    with pytest.raises(InputError, match="is told no class"):
        CONVERTERS["uvit"](without, HEADS)
    with pytest.raises(InputError, match="context_embed.weight is not part of a U-ViT"):
        CONVERTERS["uvit"](FILES["uvit"]() | {"context_embed.weight": torch.zeros(1)}, HEADS)
    with pytest.raises(InputError, match="are not LightningDiT's rotary positions"):
        CONVERTERS["lightningdit"](lightningdit() | {"feat_rope.freqs_cos": torch.zeros(ROWS**2, HEAD)}, 0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    make_autoencoder(path)
    return path


@pytest.mark.parametrize("name", ["sit", "repa", "lightningdit", "uvit"])
def test_import_makes_a_model_that_samples_and_asks_for_its_data(name, vae, tmp_path, capsys):
    file = tmp_path / f"{name}.pt"
    torch.save({"ema": FILES[name](), "args": argparse.Namespace(lr=1e-4), "steps": 4}, file)
    command = ["import", str(file), f"to={tmp_path}/model", f"autoencoder={vae}", f"heads={HEADS}"]
    if name == "lightningdit":
        assert main(command) == 2
        assert "give its latents_stats.pt as statistics=" in capsys.readouterr().err
        mean, std = torch.arange(4.0).view(1, 4, 1, 1), torch.arange(1.0, 5).view(1, 4, 1, 1)
        torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
        command.append(f"statistics={tmp_path}/latents_stats.pt")
    assert main(command) == 0
    out = capsys.readouterr()
    assert f"M parameters of {name} imported" in out.out
    assert ("left out, as they serve training alone: 6 tensors (projectors.0.0.weight, …)" in out.err) == (
        name == "repa"
    )
    loaded = load_denoiser(tmp_path / "model")
    whitening = ([0, 1, 2, 3], [1, 2, 3, 4]) if name == "lightningdit" else ([0] * 4, [1 / 0.18215] * 4)
    assert (loaded.spec.mean_C, loaded.spec.std_C) == whitening
    assert loaded.objective.config.prediction == ("eps" if name == "uvit" else "flow")
    assert main(["sample", str(tmp_path / "model"), "images=4", "steps=2", "block=4", "--quiet"]) == 0
    settings = ["evaluate.images=8", "evaluate.steps=1", "evaluate.block=4", f"evaluate.cache_dir={tmp_path}/cache"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "model"), *settings]) == 2
    said = capsys.readouterr().err
    assert "as an imported model; give evaluate.reference and evaluate.fit" in said and "Traceback" not in said
    if name == "sit":
        make_images(tmp_path / "images", 12)
        given = [f"evaluate.reference={tmp_path}/images", "evaluate.fit=pad"]
        assert main(["evaluate", str(tmp_path / "model"), *settings, *given]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mean": torch.zeros(3), "std": torch.ones(3)}, "expected are mean and std of 4 channels"),
        ({"mean": torch.zeros(4)}, "expected are mean and std"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "has a deviation of 0; it must be positive"),
        ({"mean": np.random.default_rng(0)}, "can't be read as plain tensors"),
        ([1], "holds no dictionary of tensors"),
    ],
)
def test_other_statistics_are_refused(content, said, vae, tmp_path, capsys):
    torch.save(lightningdit(), tmp_path / "l.pt")
    torch.save(content, tmp_path / "s.pt")
    command = ["import", str(tmp_path / "l.pt"), f"to={tmp_path}/m", f"autoencoder={vae}"]
    assert main([*command, f"statistics={tmp_path}/s.pt"]) == 2
    assert said in capsys.readouterr().err


def test_files_of_other_shapes_are_a_sentence(vae, tmp_path, capsys):
    for change in ({"x_embedder.proj.weight": torch.zeros(3)}, {"pos_embed": torch.zeros(1)}):
        torch.save(sit(False) | change, tmp_path / "sit.pt")
        command = ["import", str(tmp_path / "sit.pt"), f"to={tmp_path}/m", f"autoencoder={vae}", f"heads={HEADS}"]
        assert main(command) == 2
        assert "can't be read as kind=sit" in capsys.readouterr().err
    cut = {k: v for k, v in sit(False).items() if k != "blocks.1.attn.proj.bias"}
    torch.save(cut, tmp_path / "sit.pt")
    assert main(command) == 2
    assert (
        "is not a whole model of kind=sit: there is nothing for blocks.1.attention.out.bias" in capsys.readouterr().err
    )
