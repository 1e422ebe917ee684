"""Which files are images, describe them, are hidden or belong to an operating system, by their names."""

from PIL import Image

SUFFIXES = frozenset(
    f".{ending}"
    for endings in ("png apng jpg jpeg jpe jfif jp2 j2k jpx webp avif gif", "bmp dib ppm pgm pbm pnm tif tiff tga")
    for ending in endings.split()
)
SYSTEM = ("@eaDir", "__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN", "#recycle")
SYSTEM_FILES = ("Thumbs.db", "desktop.ini", "ehthumbs.db")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
READABLE_METADATA = METADATA[:2]
CAPTION_COLUMNS = ("caption", "text")  # usual names of a column, or key, of captions
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "GIF", "BMP", "PPM", "TIFF")
HEAD = 32  # bytes at the beginning of a file by which its format is known


def is_hidden(name: str) -> bool:
    """Whether a relative path has a part that begins with a dot or belongs to an operating system."""
    parts = name.split("/")
    return any(p.startswith(".") or p in SYSTEM for p in parts) or parts[-1] in SYSTEM_FILES


def suffix(name: str) -> str:
    """The last ending of a file's name, in small letters."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f"{dot}{ending}".lower() if stem else ""


def stem(name: str) -> str:
    """A name without its last ending."""
    return name[: len(name) - len(suffix(name))]


def begins_like_an_image(head: bytes) -> bool:
    """Whether a file without an ending is one that Pillow opens, by its first bytes."""
    Image.init()
    checks = (Image.OPEN[f][1] for f in FORMATS if f in Image.OPEN)
    return bool(head) and any(check is None or check(head) is True for check in checks)
