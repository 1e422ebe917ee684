"""Captioned images for the text example: Google's emoji with their names, from the npm package of them.

    npm pack emoji-datasource-google@16.0.0
    python tools/emoji.py emoji-datasource-google-16.0.0.tgz data/emoji

Writes `data/emoji/<category>/<code>.png`, 32 × 32 on white, each with its caption beside it in `<code>.txt`. Skin
tones are left out. The images are Apache-2.0 (Google's Noto Emoji), the package MIT (Cal Henderson).
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image
from program import run_tool

from ldt.files import making

SIDE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; give a directory that does not")
    with making(arguments.output) as directory, tarfile.open(arguments.package) as archive:
        written = write_images(archive, directory)
    print(f"{written} captioned images: {arguments.output}")


def write_images(archive: tarfile.TarFile, output: Path) -> int:
    """All images of the package and their captions; returns how many."""
    written = 0
    listed = json.load(_file(archive, "package/emoji.json"))
    wanted = {e["image"]: e for e in listed if e["has_img_google"] and e["category"] != "Component"}
    for member in archive:
        directory, _, name = member.name.rpartition("/")
        if directory == "package/img/google/64" and name in wanted:
            content = archive.extractfile(member)
            assert content is not None
            _write(output, wanted[name], Image.open(io.BytesIO(content.read())))
            written += 1
    return written


def _file(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    content = archive.extractfile(name)
    assert content is not None, name
    return content  # type: ignore[return-value]


def _write(output: Path, emoji: dict[str, str], image: Image.Image) -> None:
    """One image and its caption: the Unicode name in lower case, else the short name."""
    directory = output / emoji["category"].lower().replace(" & ", "-").replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    stem = Path(emoji["image"]).stem
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(background, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    small.save(directory / f"{stem}.png")
    caption = (emoji["name"] or emoji["short_name"].replace("-", " ").replace("_", " ")).lower()
    (directory / f"{stem}.txt").write_text(caption)


if __name__ == "__main__":
    run_tool(main)
