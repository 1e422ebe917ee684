"""A checkpoint's files: its tensors as they are read, one of its bits flipped, and its manifest rewritten."""

import json
from pathlib import Path

import xxhash

from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.manifest import read_manifest
from ldt.checkpoint.tensors import Reader


def tensors(run_dir):
    path = resolve(Path(run_dir))
    reader = Reader(path, read_manifest(path))
    return {kind: reader.full(kind) for kind in reader.manifest["tensors"]}


def spoil(checkpoint):
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite_manifest(path, without="", **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest.pop(without, None)
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.xxh64").write_text(xxhash.xxh64(text).hexdigest())
