"""mosaicml-streaming as installed without its dependencies: it imports two large packages that it never uses here."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import peers  # noqa: F401  (makes the peers' directory importable)

ABSENT = {
    "torchvision": {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    },
    "transformers": {
        "transformers": {},
        "transformers.feature_extraction_utils": {"BatchFeature": type("BatchFeature", (), {})},
        "transformers.tokenization_utils_base": {"BatchEncoding": type("BatchEncoding", (), {})},
        "transformers.models": {},
        "transformers.models.auto": {},
        "transformers.models.auto.tokenization_auto": {"AutoTokenizer": None},
    },
}


def load() -> Any:
    """The real package; names of what is not installed exist only while it is being imported."""
    added = []
    for package, modules in ABSENT.items():
        if package in sys.modules or importlib.util.find_spec(package) is not None:
            continue
        for name, values in modules.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            vars(module).update(values)
            sys.modules[name] = module
            added.append(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("streaming")
    finally:
        for name in added:
            del sys.modules[name]
