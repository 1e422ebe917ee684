"""Peers' evaluators, imported beside a CPU build of torch, with one random Inception for all of them.

They live in a directory of their own (`make .venv/peers`), which only processes that import this module see.
"""

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / ".venv" / "peers"))
# torchvision's wheels are CUDA builds: beside a CPU torch only this module of theirs fails, and no evaluator needs it
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def peer(name: str) -> Any:
    """Import a peer's module; its own deprecation warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def random_inception(path: Path) -> Path:
    """Inception weights under everybody's names; He-normal convolutions keep the features healthy."""
    inception = peer("torchvision.models.inception")
    fid = peer("pytorch_fid.inception")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = inception.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    blocks = [("Mixed_5b", fid.FIDInceptionA(192, 32)), ("Mixed_5c", fid.FIDInceptionA(256, 64))]
    blocks += [("Mixed_5d", fid.FIDInceptionA(288, 64)), ("Mixed_6b", fid.FIDInceptionC(768, 128))]
    blocks += [("Mixed_6c", fid.FIDInceptionC(768, 160)), ("Mixed_6d", fid.FIDInceptionC(768, 160))]
    blocks += [("Mixed_6e", fid.FIDInceptionC(768, 192)), ("Mixed_7b", fid.FIDInceptionE_1(1280))]
    blocks += [("Mixed_7c", fid.FIDInceptionE_2(2048))]
    for name, block in blocks:
        setattr(net, name, block)
    generator = torch.Generator().manual_seed(0)
    state = net.state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.1, generator=generator)
        elif name.startswith("fc"):
            value.normal_(0, 0.02, generator=generator)
    torch.save(state, path)
    return path
