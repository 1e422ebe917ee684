"""Train a small autoencoder, the stand-in for SD-VAE that needs no download: the embedded one, or one of a directory.

    OMP_NUM_THREADS=1 python tools/train_autoencoder.py ldt/assets/autoencoder_fashion_mnist --steps 4000
    OMP_NUM_THREADS=1 python tools/train_autoencoder.py models/emoji --images data/emoji --channels 3 --steps 3000
    OMP_NUM_THREADS=1 python tools/train_autoencoder.py models/mine --images photos --channels 3 --size 64 --fit crop

Images of --size pixels → 4 channels of a quarter of it, diffusers' AutoencoderKL. All images are held in memory. The
loss is L1 + L2 + a small KL term, the weights are an average over the last steps. One seed and one thread: the same
machine makes the same file again.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldt.data.images import EMBEDDED, prepare
from ldt.data.images.open import open_images
from ldt.errors import InputError

HELD_OUT = 500
KL_WEIGHT, LR, WARMUP = 1e-4, 2e-3, 100


def images(path: str, channels: int, size: int, fit: str) -> Tensor:
    """All images, brought to size as `ldt encode` does, in [-1, 1]: [B, C, size, size]."""
    source = open_images(path)
    image_BHWC = np.stack([prepare(source.image(i), size, channels, fit) for i in range(len(source))])
    return torch.from_numpy(image_BHWC.astype(np.float32)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def make_autoencoder(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def loss(model: AutoencoderKL, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    posterior = model.encode(x_BCHW).latent_dist
    difference = model.decode(posterior.sample(generator)).sample - x_BCHW
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.abs().mean() + difference.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(model: AutoencoderKL, x_BCHW: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction of the posterior's mean, in dB, mean over images."""
    y_BCHW = model.decode(model.encode(x_BCHW).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (y_BCHW - x_BCHW).square().mean((1, 2, 3)))).mean())


def main(target: Path, everything: Tensor, steps: int, batch: int) -> None:
    torch.set_num_threads(1)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1))
    few = min(HELD_OUT, len(order) // 10)
    held_out, train = everything[order[:few]], everything[order[few:]]
    model, generator = make_autoencoder(everything.shape[1]), torch.Generator().manual_seed(2)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    start = time.time()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / steps))
        x_BCHW = train[torch.randint(len(train), (batch,), generator=generator)]
        flip_B111 = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        value = loss(model, torch.where(flip_B111, x_BCHW.flip(3), x_BCHW), generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        keep = min(0.995, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if step % 250 == 0 or step == steps:
            print(
                f"step {step} loss {value.item():.4f} held-out PSNR {psnr(average, held_out):.2f} dB "
                f"{(time.time() - start) / 60:.1f} min",
                flush=True,
            )
    average.save_pretrained(target, safe_serialization=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", default=EMBEDDED)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--size", type=int, default=32, help="a multiple of 4")
    parser.add_argument("--fit", choices=("crop", "pad"), default="pad", help="as images.fit of ldt encode")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.size < 4 or arguments.size % 4:
        parser.error(f"--size={arguments.size} must be a multiple of 4, the downsampling")
    try:
        content = images(arguments.images, arguments.channels, arguments.size, arguments.fit)
    except InputError as error:
        parser.error(str(error))
    main(arguments.target, content, arguments.steps, arguments.batch)
