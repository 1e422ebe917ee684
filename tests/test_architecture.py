"""The rules of the source tree that import-linter can't express."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ldt").rglob("*.py"))

OWNERS = {
    "torch.distributed": {"dist", "engine"},
    "deepspeed": {"engine"},
    "omegaconf": {"config"},
    "wandb": {"tracking"},
    "torch.utils.tensorboard": {"tracking"},
    "submitit": {"submit"},
    "webdataset": {"data.shards.tar"},
    "flash_attn": {"nn.attention"},
    "diffusers": {"models.autoencoder", "models.representation", "nn.unet", "convert"},
    "transformers": {"models.text_encoder"},
    "timm": {"metrics.timm_net"},
    "torch_fidelity": {"metrics.inception"},
    "matplotlib": {"reporting.png"},
    "markupsafe": {"reporting.html"},
    "numba": {"data.philox", "data.digest"},
    "triton": {"data.philox_triton"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "ldt").with_suffix("").parts)


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("dependency", OWNERS)
def test_each_dependency_has_one_owner(dependency):
    users = set()
    for path in FILES:
        if any(n == dependency or n.startswith(dependency + ".") for n in imports(ast.parse(path.read_text()))):
            users.add(module_of(path))
    owned = {user: [o for o in OWNERS[dependency] if user == o or user.startswith(o + ".")] for user in users}
    assert all(owned.values()), f"{dependency} is imported by {sorted(u for u in users if not owned[u])}"
    assert {o for owners in owned.values() for o in owners} == OWNERS[dependency], "an owner that imports nothing"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_from_files_is_executed(path):
    """No unpickling, no eval, torch.load only with weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load"), (path, node.lineno)
        # archives are read in place: nothing of them can be written anywhere
        assert called.rpartition(".")[2] not in ("extract", "extractall", "unpack_archive"), (path, node.lineno)
        assert called != "torch.load" or keywords.get("weights_only") == "True", (path, node.lineno)
        assert keywords.get("allow_pickle", "False") == "False", (path, node.lineno)


def test_no_test_file_imports_another():
    """What several need is in a module of its own, so that a test file can be read, moved and deleted alone."""
    importing = {
        path.name: found
        for path in sorted((ROOT / "tests").glob("*.py"))
        if (found := sorted(name for name in imports(ast.parse(path.read_text())) if name.startswith("test_")))
    }
    assert not importing


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_modules_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
