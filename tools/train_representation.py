"""Train the decoder of a representation autoencoder: the embedded one, or one of a directory of images.

    OMP_NUM_THREADS=1 python tools/train_representation.py ldt/assets/representation_fashion_mnist --steps 1000

Images of --size pixels → 112 channels of an eighth of it: the features of a frozen EfficientNet-Lite0, whose weights
come with a package. Only the decoder is trained, with the loss, optimizer and averaging of `train_autoencoder.py`, but
without its KL term. Noise is added to the latents, of a deviation that is drawn for each image, as in RAE (2510.11690):
what a denoiser samples is not exactly a latent of an image. All images and latents are held in memory. One seed and one
thread: the same machine makes the same file again.
"""

from pathlib import Path

import torch
from program import run_tool
from torch import Tensor, nn
from train_autoencoder import optimise, psnr, read_arguments, reconstruction_loss, replace_files, split

from ldt.models.representation import EfficientNetRAE

NOISE = 0.5  # each image's noise has the deviation |NOISE · normal|, in deviations of the latents; not tuned (RAE: 0.8)
TOGETHER = 100


@torch.no_grad()
def latents(model: EfficientNetRAE, x_BCHW: Tensor) -> Tensor:
    """What the encoder sees in images: [B, 112, H/8, W/8]."""
    return torch.cat([model.encode(part) for part in x_BCHW.split(TOGETHER)])


def main(target: Path, everything: Tensor, steps: int, batch: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, generator = EfficientNetRAE(everything.shape[1]), torch.Generator().manual_seed(2)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, held_out = split(everything)
    train_z, held_out_z = latents(model, train), latents(model, held_out)
    model.mean_C11.copy_(train_z.mean((0, 2, 3), keepdim=True)[0])
    model.std_C11.copy_(train_z.std((0, 2, 3), keepdim=True)[0])
    train_z, held_out_z = model.normalise(train_z), model.normalise(held_out_z)

    def loss_of_batch() -> Tensor:
        chosen_B = torch.randint(len(train), (batch,), generator=generator)
        deviation_B111 = NOISE * torch.randn(batch, 1, 1, 1, generator=generator)
        z_BCHW = train_z[chosen_B]
        z_BCHW = z_BCHW + deviation_B111 * torch.randn(z_BCHW.shape, generator=generator)
        return reconstruction_loss(model.decoder(z_BCHW), train[chosen_B])

    def held_out_psnr(average: nn.Module) -> float:
        return psnr(average(held_out_z), held_out)

    model.decoder = optimise(model.decoder, loss_of_batch, held_out_psnr, steps)
    replace_files(target, model.save)


if __name__ == "__main__":
    arguments, content = read_arguments(__doc__, EfficientNetRAE.downsample)
    run_tool(lambda: main(arguments.target, content, arguments.steps, arguments.batch))
