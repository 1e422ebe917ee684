"""One set of images, written in every form that people have them in."""

import csv
import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import streaming_package
from PIL import Image

COUNT, CLASSES = 50, ["ant", "bee", "cat"]


def content(i):
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (9 + i % 3, 8, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_samples(count):
    """Name, bytes, label and caption of each image, in the order of a directory of classes."""
    label = lambda i: i * 3 // count  # noqa: E731
    return [(f"{CLASSES[label(i)]}/{i:05d}", content(i), label(i), f"caption {i} é") for i in range(count)]


def directory(root, samples):
    for name, image, _, caption in samples:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(image)
        (root / f"{name}.txt").write_text(caption)
    return root


def class_tar(root, samples):
    root.mkdir()
    directory(root / "src", samples)
    with tarfile.open(root / "all.tar", "w") as archive:
        for path in sorted((root / "src").rglob("*"), reverse=True):
            archive.add(path, path.relative_to(root / "src").as_posix(), recursive=False)
    return root / "all.tar"


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def web_tars(root, samples, per=17, json_label=""):
    """webdataset's and img2dataset's: a key a sample; classes.txt names the numbers."""
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for k in range(0, len(samples), per):
        with tarfile.open(root / f"{k // per:05d}.tar", "w") as archive:
            for i, (_, image, label, caption) in enumerate(samples[k : k + per]):
                add(archive, f"{k + i:08d}.png", image)
                if json_label:
                    facts = {"caption": caption, json_label: label}
                    add(archive, f"{k + i:08d}.json", json.dumps(facts).encode())
                else:
                    add(archive, f"{k + i:08d}.txt", caption.encode())
                    add(archive, f"{k + i:08d}.cls", str(label).encode())
    return root


def edm2_zip(root, samples):
    """As edm2's dataset_tool writes it, and deflated for once."""
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        labels = []
        for i, (_, image, label, caption) in enumerate(samples):
            name = f"{i // 20:05d}/img{i:08d}.png"
            kind = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            archive.writestr(name, image, kind)
            archive.writestr(name.replace(".png", ".txt"), caption, kind)
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return root / "set.zip"


def hf_parquet(root, samples):
    """As Hugging Face's datasets write it: {bytes, path}, and names of classes in the schema."""
    root.mkdir()
    info = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    for k in range(0, len(samples), 30):
        part = samples[k : k + 30]
        table = pyarrow.table(
            {
                "image": [{"bytes": image, "path": f"{name}.png"} for name, image, _, _ in part],
                "label": [label for _, _, label, _ in part],
                "caption": [caption for *_, caption in part],
            }
        ).replace_schema_metadata({"huggingface": json.dumps(info)})
        pyarrow.parquet.write_table(table, root / f"train-{k:05d}.parquet", row_group_size=7)
    return root


def plain_parquet(root, samples):
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    columns = {"jpg": [s[1] for s in samples], "label": [s[2] for s in samples], "text": [s[3] for s in samples]}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "one.parquet", row_group_size=11)
    return root / "one.parquet"


def mds(root, samples):
    columns = {"image": "bytes", "label": "int", "caption": "str"}
    with streaming_package.load().MDSWriter(out=str(root), columns=columns, size_limit=4096) as writer:
        for _, image, label, caption in samples:
            writer.write({"image": image, "label": label, "caption": caption})
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def imagefolder(root, samples, kind="jsonl"):
    """Hugging Face's imagefolder with a metadata file."""
    root.mkdir()
    rows = []
    for i, (name, image, _, caption) in enumerate(samples):
        (root / f"{i:05d}.png").write_bytes(image)
        rows.append({"file_name": f"{i:05d}.png", "label": name.split("/")[0], "text": caption})
    rows.reverse()
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        with (root / "metadata.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, ["file_name", "label", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return root


KINDS = {
    "directory": directory,
    "class tar": class_tar,
    "web tars": web_tars,
    "pattern": lambda root, s: f"{web_tars(root, s)}/{{00000..00002}}.tar",
    "glob": lambda root, s: f"{web_tars(root, s)}/*.tar",
    "zip": edm2_zip,
    "parquet": hf_parquet,
    "plain parquet": plain_parquet,
    "mds": mds,
    "jsonl": imagefolder,
    "csv": lambda root, s: imagefolder(root, s, "csv"),
}
