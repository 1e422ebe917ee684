"""What every source of images can do."""

from abc import ABC, abstractmethod
from collections import Counter

from PIL import Image

from ldt.data.images.bucket_rule import Size


class ImageSource(ABC):
    """Images with a class each. `classes` are names in label order; `len` is the number of images.

    left_out: how many files of which kind are there but no images of the set; barren: directories that would be a
    class but hold only such files; captioned: how many images have a caption, empty ones included. turn: images are
    turned as their EXIF says. seed: by which one of several captions of an image is drawn.
    """

    classes: tuple[str, ...]
    left_out: Counter[str] = Counter()
    barren: tuple[str, ...] = ()
    captioned: int = 0
    turn: bool = False
    seed: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, i: int) -> int:
        """Class number of image i."""

    @abstractmethod
    def key(self, i: int) -> str:
        """The name of image i within its source: with the sizes of its files, what it is known by."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Where image i comes from, for messages."""

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Image i, decoded; `InputError` names a file that is not a readable image."""

    def shape(self, i: int) -> Size:
        """Height and width of image i as `image` gives it; of many formats without decoding it."""
        image = self.image(i)
        return Size(image.height, image.width)

    def size(self, i: int) -> int:
        """Bytes of the file of image i as it is now."""
        return 0

    def caption_size(self, i: int) -> int:
        """Bytes of the caption of image i as it is now, −1 where there is none."""
        return -1

    def caption(self, i: int) -> str:
        """The caption of image i, one of them where it has several; empty where it has none."""
        return ""

    def remarks(self) -> list[str]:
        """What somebody should hear before hours are spent on these images."""
        out = []
        if self.left_out:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.left_out.most_common(12))
            out.append(f"left out, as no images: {kinds}")
        if self.barren:
            more = f" and {len(self.barren) - 5:,} more" if len(self.barren) > 5 else ""
            out.append(f"no class, as they hold no images: {', '.join(self.barren[:5])}{more}")
        return out
