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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from program import run_tool
from torch import Tensor, nn

from ldt.data.images import EMBEDDED, prepare
from ldt.data.images.open import open_images
from ldt.errors import InputError
from ldt.files import naming

HELD_OUT, FACTOR = 500, 4
KL_WEIGHT, LR, WARMUP = 1e-4, 2e-3, 100
M = TypeVar("M", bound=nn.Module)


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


def split(everything: Tensor) -> tuple[Tensor, Tensor]:
    """Training and held-out images."""
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1))
    few = min(HELD_OUT, len(order) // 10)
    return everything[order[few:]], everything[order[:few]]


def reconstruction_loss(y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """L1 + L2."""
    difference = y_BCHW - x_BCHW
    return difference.abs().mean() + difference.square().mean()


def psnr(y_BCHW: Tensor, x_BCHW: Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB, mean over images."""
    return float((10 * torch.log10(4 / (y_BCHW.clamp(-1, 1) - x_BCHW).square().mean((1, 2, 3)))).mean())


def optimise(model: M, loss_of_batch: Callable[[], Tensor], held_out_psnr: Callable[[M], float], steps: int) -> M:
    """Train a network by the losses of so many batches; returns the average of its weights over the last steps."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    start = time.time()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / steps))
        value = loss_of_batch()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        keep = min(0.995, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                decibels = held_out_psnr(average)
            print(
                f"step {step} loss {value.item():.4f} held-out PSNR {decibels:.2f} dB "
                f"{(time.time() - start) / 60:.1f} min",
                flush=True,
            )
    return average


def main(target: Path, everything: Tensor, steps: int, batch: int) -> None:
    torch.set_num_threads(1)
    train, held_out = split(everything)
    model, generator = make_autoencoder(everything.shape[1]), torch.Generator().manual_seed(2)

    def loss_of_batch() -> Tensor:
        x_BCHW = train[torch.randint(len(train), (batch,), generator=generator)]
        flip_B111 = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        x_BCHW = torch.where(flip_B111, x_BCHW.flip(3), x_BCHW)
        posterior = model.encode(x_BCHW).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(model.decode(posterior.sample(generator)).sample, x_BCHW) + KL_WEIGHT * kl

    def held_out_psnr(average: AutoencoderKL) -> float:
        return psnr(average.decode(average.encode(held_out).latent_dist.mean).sample, held_out)

    trained = optimise(model, loss_of_batch, held_out_psnr, steps)
    replace_files(target, lambda directory: trained.save_pretrained(directory, safe_serialization=True))


def replace_files(target: Path, save: Callable[[Path], object]) -> None:
    """Save a model into a directory; one that was there before stays as it is unless all files of the new are whole."""
    target.mkdir(parents=True, exist_ok=True)
    with naming(target), tempfile.TemporaryDirectory(dir=target) as written:
        save(Path(written))
        for file in Path(written).iterdir():
            file.replace(target / file.name)


def read_arguments(doc: str, factor: int) -> tuple[argparse.Namespace, Tensor]:
    """The arguments of a tool whose autoencoder makes images smaller by a factor, and its images."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", default=EMBEDDED)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--size", type=int, default=32, help=f"a multiple of {factor}")
    parser.add_argument("--fit", choices=("crop", "pad"), default="pad", help="as images.fit of ldt encode")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.size < factor or arguments.size % factor:
        parser.error(f"--size={arguments.size} must be a multiple of {factor}, the downsampling")
    try:
        content = images(arguments.images, arguments.channels, arguments.size, arguments.fit)
    except InputError as error:
        parser.error(str(error))
    return arguments, content


if __name__ == "__main__":
    arguments, content = read_arguments(__doc__, FACTOR)
    run_tool(lambda: main(arguments.target, content, arguments.steps, arguments.batch))
