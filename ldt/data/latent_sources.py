"""Opens the latents of other projects: the layout of the directory tells which kind they are."""

from pathlib import Path

from ldt.data.images.labels_file import LABELS
from ldt.data.latent_files import DrawFiles, LatentFiles, MomentFiles, RepaFiles, listed, load
from ldt.data.latent_shards import SafetensorsFiles
from ldt.errors import InputError


def open_latents(path: str, scale: float, second: str = "log_variance") -> LatentFiles:
    """The tree at a path. scale: what its draws were multiplied with; second: what follows the mean in moments."""
    where = Path(path)
    if not where.is_dir():
        raise InputError(f"latents={path} is not a directory; give one of .npy or .npz latents")
    features, labels = listed(where, "_features"), listed(where, "_labels")
    if len(features) == 1 and len(labels) == 1 and listed(features[0], ".npy"):
        return DrawFiles(where, features[0], labels[0], scale)
    shards = listed(where, ".safetensors")
    if shards:
        return SafetensorsFiles(where, shards)
    if (where / LABELS).is_file():
        return RepaFiles(where)
    archives = listed(where, ".npz")
    if archives:
        return MomentFiles(where, archives, second)
    for one in listed(where, ".npy")[:1]:
        load(one)  # U-ViT's are pickles: say so
    raise InputError(
        f"latents={path} has neither one *_features and one *_labels directory of .npy files nor .npz or .safetensors "
        f"files nor {LABELS} in it"
    )
