"""Labelled images from a directory, an archive or the embedded set, in one order, read one at a time."""

from ldt.data.images.decode import prepare
from ldt.data.images.embedded import EMBEDDED, FashionMNIST
from ldt.data.images.members import Fields
from ldt.data.images.open import open_encoded, open_images
from ldt.data.images.source import ImageSource

__all__ = ["EMBEDDED", "FashionMNIST", "Fields", "ImageSource", "open_encoded", "open_images", "prepare"]
