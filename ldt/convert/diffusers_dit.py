"""A model as a folder for `diffusers.DiTPipeline.from_pretrained`.

For adaLN-Zero models that predict eps on the discrete schedule of DDPM or one of latent diffusion's, told the class and
built of DiT's parts. Whitening goes into the autoencoder's 1×1 convolutions, exactly; the pipeline's unconditional
label is always 1000, so the class table is filled up to there with the null label's row.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldt.checkpoint.load import Loaded
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.objectives import Objective
from ldt.diffusion.schedules import DiscreteVP
from ldt.errors import InputError
from ldt.files import making
from ldt.models.autoencoder import Autoencoder
from ldt.nn.config import ModelConfig
from ldt.nn.transformer import Transformer

NULL = 1000
NEEDED = {
    "name": "transformer",
    "condition_on": "class",
    "conditioning": "adaln_zero",
    "positions": "sincos",
    "norm": "layer",
    "norm_eps": 1e-6,
    "mlp": "gelu",
    "qk_norm": False,
    "value_residual": False,
    "qkv_bias": True,
    "long_skips": False,
    "output_convolution": False,
    "size_conditioning": False,
    "time": "steps",
    "time_frequencies": "diffusers",
    "time_embedding": "mlp",
}


def write_pipeline(loaded: Loaded, directory: Path) -> None:
    """Write the folder; a model that diffusers' DiT can't be is refused."""
    assert isinstance(loaded.denoiser, Transformer)
    check(loaded.denoiser.config, loaded.objective, loaded.spec)
    autoencoder = Autoencoder.load(loaded.spec.autoencoder)
    if autoencoder.hash != loaded.spec.autoencoder_hash:
        raise InputError(f"autoencoder {autoencoder.name} is not the one that the model was trained with; restore it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    config, shape = loaded.denoiser.config, loaded.spec.latent_shape
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=shape[0],
        out_channels=shape[0] * (2 if config.learned_sigma else 1),
        num_layers=config.depth,
        sample_size=shape[1],
        patch_size=config.patch,
        num_embeds_ada_norm=NULL,
        norm_eps=1e-6,
    )
    transformer.load_state_dict(state_dict(loaded.denoiser))
    schedule = loaded.objective.schedule
    assert isinstance(schedule, DiscreteVP)
    scheduler = DDIMScheduler(trained_betas=schedule.betas.tolist(), clip_sample=False)
    with warnings.catch_warnings(), making(directory) as written:
        warnings.simplefilter("ignore")
        DiTPipeline(transformer, whitened(autoencoder.model, loaded.spec), scheduler).save_pretrained(written)
        index = written / "model_index.json"
        names = {"id2label": {str(i): name for i, name in enumerate(loaded.spec.classes)}}
        index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=2))


def check(config: ModelConfig, objective: Objective, spec: LatentSpec) -> None:
    """Refuse models that diffusers' DiT cannot express."""
    for key, value in NEEDED.items():
        if getattr(config, key) != value:
            raise InputError(
                f"diffusers' DiT can't hold this model: model.{key}={getattr(config, key)} would have to be {value}; "
                "export it as safetensors"
            )
    if config.head.depth:
        raise InputError(
            "diffusers' DiT can't hold this model: it has a wide head (model.head); export it as safetensors"
        )
    if spec.token:
        raise InputError(
            "diffusers' DiT can't hold this model: it denoises a class token (align.token_weight); export it as "
            "safetensors"
        )
    if objective.config.prediction != "eps" or not isinstance(objective.schedule, DiscreteVP):
        raise InputError(
            f"diffusers' DiT predicts eps on a discrete schedule, not {objective.config.prediction} on "
            f"{objective.config.schedule}; export this model as safetensors"
        )
    if config.mlp_ratio != 4 or spec.latent_shape[1] != spec.latent_shape[2]:
        raise InputError("diffusers' DiT has model.mlp_ratio=4 and square latents; export this model as safetensors")
    if len(spec.classes) > NULL:
        raise InputError(f"diffusers' DiTPipeline knows {NULL} classes, not {len(spec.classes)}")


def state_dict(ours: Transformer) -> dict[str, Tensor]:
    """Our parameters under diffusers' names. Each of its blocks has a copy of the time's and the class's embedding."""
    assert ours.label is not None
    config, own = ours.config, {k: v.detach() for k, v in ours.state_dict().items()}
    table = own["label.weight"]
    shared = {f"timestep_embedder.linear_1.{k}": own[f"time.up.{k}"] for k in ("weight", "bias")}
    shared |= {f"timestep_embedder.linear_2.{k}": own[f"time.down.{k}"] for k in ("weight", "bias")}
    filled = torch.cat([table[:-1], table[-1:].expand(NULL + 2 - len(table), -1)])
    shared["class_embedder.embedding_table.weight"] = filled
    out = {
        "pos_embed.proj.weight": own["patchify.weight"].unflatten(1, (-1, config.patch, config.patch)),
        "pos_embed.proj.bias": own["patchify.bias"],
    }
    for i in range(config.depth):
        theirs, mine = f"transformer_blocks.{i}", f"blocks.{i}"
        out |= {f"{theirs}.norm1.emb.{name}": tensor for name, tensor in shared.items()}
        for kind in ("weight", "bias"):
            out[f"{theirs}.norm1.linear.{kind}"] = own[f"{mine}.modulation.{kind}"]
            qkv = own[f"{mine}.attention.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", qkv, strict=True)}
            out[f"{theirs}.attn1.to_out.0.{kind}"] = own[f"{mine}.attention.out.{kind}"]
            out[f"{theirs}.ff.net.0.proj.{kind}"] = own[f"{mine}.mlp.up.{kind}"]
            out[f"{theirs}.ff.net.2.{kind}"] = own[f"{mine}.mlp.down.{kind}"]
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = own[f"modulation.{kind}"]
        patch = own[f"unpatchify.{kind}"].unflatten(0, (-1, config.patch, config.patch))
        out[f"proj_out_2.{kind}"] = patch.movedim(0, 2).flatten(0, 2)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}


def whitened(vae: Any, spec: LatentSpec) -> Any:
    """The autoencoder for whitened latents: it whitens what it encodes, and undoes that before it decodes."""
    if spec.by_element or type(vae).__name__ != "AutoencoderKL":
        raise InputError(
            "diffusers' DiTPipeline decodes with an AutoencoderKL, whitened by channel, and autoencoder "
            f"{spec.autoencoder} of this model is another or whitened by element; export it as safetensors"
        )
    if not (vae.config.use_quant_conv and vae.config.use_post_quant_conv):
        raise InputError(
            f"autoencoder {spec.autoencoder} has no 1x1 convolutions around its latents, into which the whitening "
            "could go; export this model as safetensors"
        )
    vae = copy.deepcopy(vae)
    mean_C, std_C = torch.tensor(spec.mean_C), torch.tensor(spec.std_C)
    with torch.no_grad():
        after = vae.post_quant_conv
        after.bias += after.weight[:, :, 0, 0] @ mean_C
        after.weight *= std_C[:, None, None]
        before, channels = vae.quant_conv, len(mean_C)
        before.weight[:channels] /= std_C[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean_C) / std_C
        before.bias[channels:] -= 2 * std_C.log()  # the second half is the logarithm of the variance
    vae.register_to_config(scaling_factor=1.0, _name_or_path="")
    return vae
