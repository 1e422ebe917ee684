"""Tiny autoencoders of every kind of diffusers', with random weights."""

import warnings
from pathlib import Path

import torch

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
KL = BLOCKS | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
DC = {f"{part}_block_out_channels": (8, 8, 16) for part in ("encoder", "decoder")}
DC |= {f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")}
DC |= {f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")}
QWEN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]}
TINY = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
TINY |= {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
RAE = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 7,
    "encoder_num_hidden_layers": 1,
    "encoder_input_size": 28,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "patch_size": 8,
    "noise_tau": 0.8,
}
KINDS = {  # settings; channels, factor and posterior of the latents
    "AutoencoderKL": (KL | {"latent_channels": 4}, (4, 4, True)),
    "AutoencoderDC": (DC | {"latent_channels": 8, "attention_head_dim": 8}, (8, 4, False)),
    "AutoencoderKLFlux2": (KL | {"latent_channels": 8, "sample_size": 32}, (8, 4, True)),
    "AutoencoderKLQwenImage": (QWEN | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, (4, 4, True)),
    "AutoencoderTiny": (TINY | {"latent_channels": 4}, (4, 4, False)),
    "AutoencoderRAE": (RAE, (64, 8, False)),
}


def make_kind(kind: str, path: Path, seed: int = 0) -> Path:
    """A random autoencoder of that kind, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(diffusers, kind)(**KINDS[kind][0]).save_pretrained(path)
    return path
