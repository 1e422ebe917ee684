"""What an autoencoder makes of embedded images, to score what it costs by itself.

python tools/reconstruct.py embedded:fashion_mnist reconstructed.npz
ldt score reconstructed.npz reference=embedded:fashion_mnist fit=pad
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from program import run_tool

from ldt.data.images import EMBEDDED, prepare
from ldt.data.images.open import open_images
from ldt.image_files import write_npz
from ldt.models.autoencoder import Autoencoder


def main(name: str, output: Path, count: int) -> None:
    torch.set_num_threads(1)
    source, autoencoder = open_images(EMBEDDED), Autoencoder.load(name)
    image_BHWC = torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "pad") for i in range(count)]))
    parts = (autoencoder.decode(autoencoder.encode(part)[0]).numpy() for part in image_BHWC.split(50))
    write_npz(output, parts, np.array([source.label(i) for i in range(count)]), {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("autoencoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=1300)
    arguments = parser.parse_args()
    run_tool(lambda: main(arguments.autoencoder, arguments.output, arguments.images))
