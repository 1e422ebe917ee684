"""The kernels agree, the right one is chosen, flash-attn is found or not, and text makes nobody wait."""

import importlib
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn import attention, block, transformer
from ldt.nn.attention import Flash, Padding, attend, choose_kernel, padding_of
from ldt.nn.build import build, compile_blocks
from ldt.nn.config import ModelConfig
from ldt.nn.text_shape import TextShape

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HALF = torch.bfloat16


def row_attention(q_TKE, k_TKE, v_TKE, ends_q, ends_k, longest_q, longest_k, deterministic=False):
    """Each sample by itself, as flash-attn's varlen kernels do; some may be empty."""
    assert ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k)
    parts = []
    for start, stop in zip(ends_q.tolist(), ends_q.tolist()[1:], strict=False):
        assert 0 <= stop - start <= longest_q == longest_k
        one = [x[start:stop].transpose(0, 1)[None] for x in (q_TKE, k_TKE, v_TKE)]
        parts.append(attend(*one, "reference")[0].transpose(0, 1))
    return torch.cat(parts)


def dense_attention(q_BNKE, k_BNKE, v_BNKE, deterministic=False):
    return attend(*(x.transpose(1, 2) for x in (q_BNKE, k_BNKE, v_BNKE)), "reference").transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    """A flash-attn of plain PyTorch, for any device."""
    monkeypatch.setitem(attention.FLASH, "flash2", Flash(dense_attention, row_attention))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["reference", "cudnn", "flash2"])
def test_kernels_agree_forward_and_backward(flash, kernel, dtype, padded):
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(4, 3, 17, 8, generator=g, dtype=dtype) for _ in range(4))
    mask = torch.rand(4, 17, generator=g) < torch.tensor([[1.0], [0.6], [0.3], [0.0]])
    mask[3, 5] = True
    results = []
    for name in ("sdpa", kernel):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, name, padding_of(mask, name) if padded else None)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_what_is_masked_is_as_if_it_were_not_there():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[6], [9]])
    out = attend(q, k, v, "sdpa", Padding(mask))
    torch.testing.assert_close(out[:1, :, :6], attend(q[:1, :, :6], k[:1, :, :6], v[:1, :, :6], "reference"))
    assert not out[0, :, 6:].any()


def test_cudnn_comes_first_where_it_is_asked_for():
    """In torch's own order it is the last but one (flash, efficient, math, cudnn in this build)."""
    seen = []

    class Order(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append(torch._C._get_sdp_priority_order()[0])
            return func(*args, **(kwargs or {}))

    x = torch.zeros(1, 1, 4, 8)
    with Order():
        attend(x, x, x, "cudnn")
        attend(x, x, x, "sdpa")
    assert seen[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION) != seen[1]


def test_the_backward_pass_is_deterministic_where_it_must_be(monkeypatch):
    asked = []

    def dense(q, k, v, deterministic):
        asked.append(deterministic)
        return q, "the softmax's sums, as early versions of flash-attn 3 return"

    monkeypatch.setitem(attention.FLASH, "flash3", Flash(dense, dense))
    x = torch.ones(1, 1, 4, 8)
    assert torch.equal(attend(x, x, x, "flash3"), x)
    torch.use_deterministic_algorithms(True)
    try:
        attend(x, x, x, "flash3")
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


# ------------------------------------------------------------------------------------------------------ which it is

GOOD = (
    "def flash_attn_func(q, k, v, deterministic=False): ...\ndef flash_attn_varlen_func(*a, deterministic=False): ..."
)
WRONG_TORCH = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """`installed(name=source)` makes packages importable, with no source a namespace package; on a given GPU."""

    def install(capability, **packages):
        for name, source in packages.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / ("__init__.py" if source else "cute.py")).write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attention, "FLASH", {})
    attention.find_flash.cache_clear()
    yield install
    attention.find_flash.cache_clear()
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("capability", "packages", "chosen"),
    [
        ((8, 0), {}, "sdpa"),
        ((9, 0), {}, "cudnn"),
        ((10, 0), {}, "cudnn"),
        ((8, 0), {"flash_attn": GOOD}, "flash2"),
        ((9, 0), {"flash_attn": GOOD}, "cudnn"),
        ((9, 0), {"flash_attn": GOOD, "flash_attn_interface": GOOD}, "flash3"),
        ((8, 0), {"flash_attn": GOOD, "flash_attn_interface": GOOD}, "flash2"),
        ((8, 0), {"flash_attn": ""}, "sdpa"),
        ((8, 0), {"flash_attn": WRONG_TORCH}, "sdpa"),
        ((9, 0), {"flash_attn_interface": WRONG_TORCH}, "cudnn"),
    ],
)
def test_auto_is_the_fastest_that_works(installed, capability, packages, chosen):
    installed(capability, **packages)
    assert choose_kernel("auto", CUDA, HALF) == chosen
    assert choose_kernel("auto", CUDA, torch.float32) == choose_kernel("auto", CPU, HALF) == "sdpa"
    assert choose_kernel("sdpa", CUDA, HALF) == "sdpa" and choose_kernel("cudnn", CUDA, HALF) == "cudnn"


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({}, "needs flash-attn, and it is not installed; pip install"),
        ({"flash_attn": ""}, "and it can't be imported: cannot import name 'flash_attn_func'"),
        ({"flash_attn": "import no_such_dependency"}, "and it can't be imported: No module named 'no_such_dep"),
        ({"flash_attn": WRONG_TORCH}, "and it can't be imported: flash_attn_2_cuda.so: undefined symbol"),
    ],
)
def test_flash_that_does_not_work_is_refused_at_the_start(installed, packages, words):
    installed((9, 0), **packages)
    with pytest.raises(InputError, match=words):
        choose_kernel("flash", CUDA, HALF)


def test_flash_that_works_is_taken(installed):
    installed((9, 0), flash_attn=GOOD)
    assert choose_kernel("flash", CUDA, HALF) == "flash2"
    for name in ("flash", "cudnn"):
        with pytest.raises(InputError, match=f"model.attention={name} runs on CUDA in half precision, not on cpu"):
            choose_kernel(name, CPU, HALF)


# --------------------------------------------------------------------------------------------- text, without waiting

TEXT = TextShape(6, vocabulary=20)


def text_batch(samples, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (samples,), generator=g)
    text = torch.randint(1, 20, (samples, 6), generator=g) * (torch.arange(6) < lengths[:, None])
    label = torch.randint(0, 11, (samples,), generator=g)
    return torch.randn(samples, 4, 8, 8, generator=g), torch.rand(samples, generator=g), Condition(label, text)


def choose_flash(monkeypatch):
    for module in (transformer, block):
        monkeypatch.setattr(module, "choose_kernel", lambda *a: "flash2")


class Syncs(TorchDispatchMode):
    """Operations whose results the host must see before it can go on."""

    WAITS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        moves = name == "aten::_to_copy" and (kwargs or {}).get("device", args[0].device) != args[0].device
        if name in self.WAITS or moves:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def stand_in(q, k, v, *rest, deterministic=False):
    return q + k + v


@pytest.mark.parametrize("conditioning", ["in_context", "adaln_zero"])
@pytest.mark.parametrize("kernel", ["sdpa", "flash2"])
def test_text_costs_no_wait(monkeypatch, kernel, conditioning):
    """Forward and backward: no operation has a result that the host needs, and places are made once a forward pass."""
    monkeypatch.setitem(attention.FLASH, "flash2", Flash(stand_in, stand_in))
    if kernel == "flash2":
        choose_flash(monkeypatch)
    config = ModelConfig(width=32, depth=4, heads=2, condition_on="class_and_text", conditioning=conditioning)
    model = build(config, (4, 8, 8), 10, 0, TEXT)
    sorts = []
    monkeypatch.setattr(torch, "argsort", lambda *a, _sort=torch.argsort, **k: sorts.append(1) or _sort(*a, **k))
    with Syncs() as syncs:
        model(*text_batch(3)).square().sum().backward()
    assert syncs.names == []
    assert len(sorts) == (1 if kernel == "flash2" and conditioning == "in_context" else 0)


def test_no_shape_depends_on_the_texts():
    with FakeTensorMode():
        padding = padding_of(torch.ones(3, 17, dtype=torch.bool), "flash2")
        assert padding.place_T.shape == (51,) and padding.ends.shape == (7,)
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    padding = padding_of(mask, "flash2")
    assert padding.place_T.tolist() == [0, 2, 3, 1, 4, 5, 6, 7] and padding.ends.tolist() == [0, 3, 4, 5, 8]


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash2"])
@pytest.mark.parametrize("options", [{}, {"long_skips": True}, {"long_skips": True, "value_residual": True}], ids=str)
def test_every_use_of_a_compiled_block_stays_compiled(monkeypatch, options, kernel):
    """Training, validation and previews, with and without guidance, of every kind of block."""
    monkeypatch.setitem(attention.FLASH, "flash2", Flash(stand_in, stand_in))
    for module in (transformer, block):
        monkeypatch.setattr(module, "choose_kernel", lambda *a: kernel)
    monkeypatch.setattr(torch, "compile", lambda f, _compile=torch.compile, **k: _compile(f, **k, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = build(
        ModelConfig(width=32, depth=4, heads=2, condition_on="class_and_text", **options), (4, 8, 8), 10, 0, TEXT
    )
    compile_blocks(model)
    graphs = []
    for again in range(3):
        model(*text_batch(4, again)).square().sum().backward()
        with torch.no_grad():
            for samples in (4, 5, 10):
                model(*text_batch(samples, again))
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"], "it fell back to eager code somewhere"
    assert graphs[0] == graphs[1] == graphs[2], "other texts compiled it again"
