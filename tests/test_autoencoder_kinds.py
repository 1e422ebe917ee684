"""Every kind of diffusers' autoencoders: tiny ones with random weights, built and saved by diffusers' own classes.

RAE's encoder is transformers', which is installed apart: its case runs in a process of its own (`make .venv/text`).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_autoencoders import BLOCKS, KINDS, make_kind
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
from ldt.models.autoencoder_kinds import KL as KL_ADAPTER
from ldt.sampling.config import DrawConfig

LIBRARIES = Path(__file__).parents[1] / ".venv" / "text"


def theirs(kind: str, path: Path, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Mean, deviation and reconstruction by the library's own calls."""
    import diffusers

    model = getattr(diffusers, kind).from_pretrained(path, low_cpu_mem_usage=False).eval()
    x = image.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        if kind == "AutoencoderRAE":
            latent = model.encode((x + 1) / 2).latent
            return latent, None, model.decode(latent).sample * 2 - 1
        if kind == "AutoencoderDC":
            latent = model.encode(x).latent
            return latent, None, model.decode(latent).sample
        if kind == "AutoencoderTiny":
            latent = model.encode(x).latents
            return latent, None, model.decode(latent).sample
        if kind == "AutoencoderKLQwenImage":
            posterior = model.encode(x.unsqueeze(2)).latent_dist
            again = model.decode(posterior.mean).sample.squeeze(2)
            return posterior.mean.squeeze(2), posterior.std.squeeze(2), again
        posterior = model.encode(x).latent_dist
        return posterior.mean, posterior.std, model.decode(posterior.mean).sample


def check(kind: str, root: Path) -> None:
    """Equal to the library's, the same twice, known by its hash, and as its facts say."""
    path = make_kind(kind, root / "one")
    ours = Autoencoder.load(str(path)).to("cpu")
    channels, factor, posterior = KINDS[kind][1]
    assert (ours.kind, ours.latent_channels, ours.downsample, ours.posterior) == (kind, channels, factor, posterior)
    image = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = ours.encode(image)
    expected, expected_std, decoded = theirs(kind, path, image)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    assert mean.shape == (3, channels, 32 // factor, 32 // factor) and mean.dtype == torch.float32
    assert (std is None) == (expected_std is None) == (not posterior)
    if std is not None and expected_std is not None:
        torch.testing.assert_close(std, expected_std, rtol=1e-4, atol=1e-5)
    pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = (ours.decode(mean).float() - pixels).abs()
    assert difference.max() <= 1 and difference.mean() < 0.02
    assert torch.equal(ours.encode(image)[0], mean), "nothing is drawn at random"
    assert Autoencoder.load(str(path)).hash == ours.hash
    assert Autoencoder.load(str(make_kind(kind, root / "two", seed=1))).hash != ours.hash


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "AutoencoderRAE"])
def test_every_kind_is_diffusers_own(kind, tmp_path):
    check(kind, tmp_path)


RAE_CASE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
from test_autoencoder_kinds import check
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
root = Path(sys.argv[1])
check("AutoencoderRAE", root)
weights, before = root / "one" / "diffusion_pytorch_model.safetensors", Autoencoder.load(str(root / "one")).hash
table = {"decoder.decoder_pos_embed": torch.zeros(1, 17, 32)}  # as older files hold it; the class makes it itself
save_file(load_file(weights) | table, weights, {"format": "pt"})
assert Autoencoder.load(str(root / "one")).hash == before
try:
    Autoencoder.load(str(root / "one")).encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
except InputError as error:
    assert "takes images of 32x32 alone, not 64x64; set images.size=32" in str(error), error
import numpy as np
from ldt import cli
from ldt.data.shards import open_shards
from PIL import Image
for i in range(6):
    (root / "images" / "ant").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(root / f"images/ant/{i}.png")
keys = [f"images.path={root}/images", "images.size=32", f"autoencoder={root}/one", f"output={root}/data"]
keys += ["whitening=element", "dtype=fp32", "validation_fraction=0", f"images.index_dir={root}/index"]
assert cli.main(["encode", *keys]) == 0
shards, model = open_shards(root / "data"), Autoencoder.load(str(root / "one"))
assert not shards.manifest.posterior and shards.manifest.latent_shape == (64, 4, 4)
stored = shards.read(np.zeros(6, np.int64), np.arange(6)).mean_nCHW
pixels = np.stack([np.asarray(Image.open(p)) for p in sorted((root / "images").rglob("*.png"))])
expected = model.encode(torch.from_numpy(pixels))[0].numpy()
order = [int(np.abs(expected - latent).max((1, 2, 3)).argmin()) for latent in stored]
assert sorted(order) == list(range(6)) and np.abs(stored - expected[order]).max() < 1e-4
np.testing.assert_allclose(shards.manifest.whitening[0], stored.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
print("done")
"""


def test_a_representation_autoencoder_is_diffusers_own_and_takes_one_size(tmp_path):
    assert (LIBRARIES / "transformers").is_dir(), "make .venv/text installs transformers for this test"
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here, here.parent / "tools", LIBRARIES)))
    done = subprocess.run(
        [sys.executable, "-c", RAE_CASE, tmp_path],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]


def test_a_representation_autoencoder_without_transformers_says_what_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    with pytest.raises(InputError, match=r"AutoencoderRAE, which needs transformers; pip install ldt-train\[text\]"):
        Autoencoder.load(str(tmp_path))


def test_decoding_in_slices_is_decoding_each_slice(tmp_path):
    """The same bits as slices decoded alone: their number in a call is all that an image depends on."""
    autoencoder = Autoencoder.load(str(make_kind("AutoencoderTiny", tmp_path)))
    latent = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 4, 8, 8)).astype(np.float32))
    sliced = autoencoder.decode(latent, at_once=3)
    assert torch.equal(sliced, torch.cat([autoencoder.decode(part) for part in latent.split(3)]))
    assert torch.equal(autoencoder.decode(latent, at_once=0), autoencoder.decode(latent))


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors that were alive at once, those that were there before left out."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out


def test_50_images_of_512_pixels_are_decoded_within_40_gb():
    """Stable Diffusion's decoder on tensors without content: 50 at once need more than 40 GB, the default slices 13."""
    from diffusers import AutoencoderKL

    shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    shape |= {key: types[:1] * 4 for key, types in BLOCKS.items()}
    peaks = {}
    with FakeTensorMode():
        autoencoder = Autoencoder.__new__(Autoencoder)  # a hash needs content
        autoencoder.device, autoencoder._adapter = torch.device("cpu"), KL_ADAPTER(AutoencoderKL(**shape).eval())
        for at_once in (DrawConfig().decode_slice, 0):
            with PeakMemory() as peak:
                autoencoder.decode(torch.zeros(50, 4, 64, 64), at_once)
            peaks[at_once] = peak.bytes
    assert peaks[0] > 40e9 and peaks[DrawConfig().decode_slice] < 14e9
