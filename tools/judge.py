"""Score sets of Fashion-MNIST images by a judge that is no relation of EfficientNet-Lite0, the offline detector.

    ldt sample runs/fashion_mnist format=npz images=1300 block=50 sampler=euler steps=12 guidance=1.5 output=samples.npz
    python tools/judge.py samples.npz

The judge is a small classifier, trained here on the embedded images: a minute on one core, the same on every start.
Printed are, for each set, the Fréchet distance of its 64 last features to those of all embedded images, and of how many
images it names the class that was asked for (arr_1). The scale is its own: compare sets judged by one start.
"""

import argparse

import torch
import torch.nn.functional as F
from program import run_tool
from torch import Tensor, nn
from train_autoencoder import images, split

from ldt.data.images import EMBEDDED
from ldt.data.images.open import open_images
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.moments import Moments

EPOCHS, BATCH, LR = 5, 50, 1e-3


class Judge(nn.Module):
    """Grey images [B, 1, 32, 32] → 64 features; `classify` makes the 10 logits of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 48, 3, padding=1)])
        self.features, self.classify = nn.Linear(48 * 8 * 8, 64), nn.Linear(64, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x_BCHW = F.max_pool2d(F.relu(convolution(x_BCHW)), 2)
        return F.relu(self.features(x_BCHW.flatten(1)))


def train(x_BCHW: Tensor, label_B: Tensor) -> Judge:
    judge, generator = Judge(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(judge.parameters(), LR)
    for _ in range(EPOCHS):
        for chosen_B in torch.randperm(len(x_BCHW), generator=generator).split(BATCH):
            loss = F.cross_entropy(judge.classify(judge(x_BCHW[chosen_B])), label_B[chosen_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.requires_grad_(False)


def look(judge: Judge, x_BCHW: Tensor, label_B: Tensor) -> tuple[Moments, float]:
    """Moments of the features, and the share of images of which it names the class."""
    feature_BD = torch.cat([judge(part) for part in x_BCHW.split(500)])
    named_B = judge.classify(feature_BD).argmax(1) == label_B
    return Moments.of(feature_BD.numpy()), float(named_B.float().mean())


def read(path: str) -> tuple[Tensor, Tensor]:
    """Images and their classes."""
    source = open_images(path)
    return images(path, 1, 32, "pad"), torch.tensor([source.label(i) for i in range(len(source))])


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    x_BCHW, label_B = read(EMBEDDED)
    (train_x, held_out_x), (train_label, held_out_label) = split(x_BCHW), split(label_B)
    judge = train(train_x, train_label)
    print(f"held-out real images: named {look(judge, held_out_x, held_out_label)[1]:.3f}")
    real, _ = look(judge, x_BCHW, label_B)
    for path in paths:
        of_set, named = look(judge, *read(path))
        distance = frechet_distance(of_set.mean_D, of_set.covariance_DD, real.mean_D, real.covariance_DD)
        print(f"{path}: {of_set.count} images, fd_judge {distance:.3f}, named {named:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", help=".npz files of ldt sample or tools/reconstruct.py")
    sets = parser.parse_args().sets
    run_tool(lambda: main(sets))
