"""The images that come with ldt."""

import importlib.resources

import numpy as np
from PIL import Image

from ldt.data.images.source import ImageSource

EMBEDDED = "embedded:fashion_mnist"
CROPPED = "embedded:fashion_mnist_cropped"


class FashionMNIST(ImageSource):
    """The 10,000 test images of Fashion-MNIST, 28 × 28 and grey, 1,000 a class (MIT, (c) 2017 Zalando SE)."""

    side, columns = 28, 100

    def __init__(self) -> None:
        assets = importlib.resources.files("ldt") / "assets" / "fashion_mnist"
        self.classes = tuple((assets / "classes.txt").read_text().split())
        self._labels = np.frombuffer((assets / "labels.bin").read_bytes(), np.uint8)
        with (assets / "images.webp").open("rb") as f:
            self._sheet = np.asarray(Image.open(f).convert("L"))
        self.captioned = len(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def key(self, i: int) -> str:
        return str(i)

    def name(self, i: int) -> str:
        return f"{EMBEDDED}/{i}"

    def caption(self, i: int) -> str:
        return self.classes[self.label(i)].replace("_", " ")

    def image(self, i: int) -> Image.Image:
        y, x = (self.side * k for k in divmod(i, self.columns))
        return Image.fromarray(self._sheet[y : y + self.side, x : x + self.side])


class CroppedFashionMNIST(FashionMNIST):
    """The same without their black borders: trousers are tall, shoes are wide."""

    def name(self, i: int) -> str:
        return f"{CROPPED}/{i}"

    def image(self, i: int) -> Image.Image:
        whole = super().image(i)
        return whole.crop(whole.getbbox())
