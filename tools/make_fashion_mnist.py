"""Make the embedded image set: the 10,000 test images of Fashion-MNIST (1,000 of each class) as one lossless sheet.

    apt-get install dataset-fashion-mnist
    python tools/make_fashion_mnist.py /usr/share/datasets/fashion-mnist ldt/assets/fashion_mnist

Writes images.webp (100 × 100 tiles of 28 × 28, in the order of the data set), labels.bin (a byte an image) and
classes.txt. The images are MIT-licensed, (c) 2017 Zalando SE; the notice stands beside them.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from program import run_tool

from ldt.files import replacing, write_atomic

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
TILES, SIDE = 100, 28


def main(source: Path, target: Path) -> None:
    images = gzip.decompress((source / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((source / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    tiles = np.frombuffer(images, np.uint8).reshape(TILES, TILES, SIDE, SIDE)
    assert np.bincount(np.frombuffer(labels, np.uint8)).tolist() == [1000] * len(CLASSES)
    sheet = tiles.transpose(0, 2, 1, 3).reshape(TILES * SIDE, TILES * SIDE)
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / "images.webp") as written:
        Image.fromarray(sheet).convert("RGB").save(written, "webp", lossless=True, quality=100, method=6)
    write_atomic(target / "labels.bin", labels)
    write_atomic(target / "classes.txt", ("\n".join(CLASSES) + "\n").encode())


if __name__ == "__main__":
    run_tool(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
