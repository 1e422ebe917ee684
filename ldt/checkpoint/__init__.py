"""Elastic checkpoints: written by any number of ranks at any ZeRO stage, read by any other, or by one process alone."""

from ldt.checkpoint.denoiser import Loaded, load_denoiser
from ldt.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    MODEL,
    Damaged,
    Progress,
    Sampling,
    listed,
    newest,
    read_manifest,
    resolve,
    verify,
    versions,
)
from ldt.checkpoint.restore import Averages, newest_whole, restore, start_from
from ldt.checkpoint.tensors import Reader
from ldt.checkpoint.writer import Content, Retention, Writer, remove_old

__all__ = [
    "MANIFEST",
    "MANIFEST_HASH",
    "MODEL",
    "Averages",
    "Content",
    "Damaged",
    "Loaded",
    "Progress",
    "Reader",
    "Retention",
    "Sampling",
    "Writer",
    "listed",
    "load_denoiser",
    "newest",
    "newest_whole",
    "read_manifest",
    "remove_old",
    "resolve",
    "restore",
    "start_from",
    "verify",
    "versions",
]
