"""Lists of banks that C++ merges, and puts into one allocation (csrc/autograd/merging.cpp): as Python's way does."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import contextlib

import pytest
import torch
from cuda_host import DEVICE, DTYPES, needs_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

needs_cuda()

from adamix_kernels.functional import merge_experts
from adamix_kernels.ops import _direct, _node
from adamix_kernels.ops.merge._results import Results
from adamix_kernels.ops.merge.api import merge_banks

SHAPES = [(4, 16, 64), (4, 16), (3, 7, 5), (1, 33), (2, 1100), (4, 0), (9,), (4, 16), (2, 1, 3)]


class Spy:
    """The module of nodes; taken: what its calls gave anything but None."""

    def __init__(self, module):
        self._module, self.taken = module, []

    def __getattr__(self, name):
        def noted(*given):
            made = getattr(self._module, name)(*given)
            if made is not None and name != "places":
                self.taken.append(name)
            return made

        return noted


@pytest.fixture
def spy(monkeypatch):
    module = _node.loaded()
    assert module is not None, "the build puts the module beside the library"
    made = Spy(module)
    monkeypatch.setattr(_node, "loaded", lambda: made)
    return made


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def in_python(monkeypatch, *given):
    with monkeypatch.context() as patched:
        patched.setattr(_node, "loaded", lambda: None)
        return merge_banks(*given, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", ["none", "all", "some"])
def test_a_list_of_banks_has_the_bits_of_pythons_way(scored, dtype, spy, monkeypatch):
    banks = [nn.Parameter(randn(*shape, dtype=dtype)) for shape in SHAPES]
    which = {"none": 0, "all": 1, "some": 2}[scored]
    scores = [randn(len(bank)) if which and n % which == 0 else None for n, bank in enumerate(banks)]
    got = merge_banks(banks, scores, backend="cuda")
    assert spy.taken == ["merge_banks"]
    for mine, theirs, bank in zip(got, in_python(monkeypatch, banks, scores), banks, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.shape == bank.shape[1:]
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        assert mine.is_leaf
        assert not mine.requires_grad
        assert not mine._is_view()


def test_more_banks_than_a_launch_holds(spy, monkeypatch):
    banks = [randn(2, n % 5) for n in range(300)]
    got = merge_banks(banks, [None] * 300, backend="cuda")
    assert spy.taken == ["merge_banks"]
    assert all(map(torch.equal, got, in_python(monkeypatch, banks, [None] * 300)))


def test_each_result_is_a_tensor_of_its_own(spy):
    banks = [randn(2, 3, 5), randn(2, 5), randn(2, 3, 5)]
    first, second, third = merge_banks(banks, [None] * 3, backend="cuda")
    assert spy.taken == ["merge_banks"]
    kept = second.clone(), third.clone()
    leaf = first.requires_grad_()
    (leaf * leaf).sum().backward()
    assert torch.equal(leaf.grad, 2 * leaf)
    with torch.no_grad():
        first.zero_()
    assert [t._version for t in (first, second, third)] == [1, 0, 0]
    assert torch.equal(second, kept[0])
    assert torch.equal(third, kept[1])
    second.mul_(2)  # where gradients are on


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


UNUSUAL = {
    "strides": lambda bank, score: (bank.t().contiguous().t(), score),
    "16-bit scores": lambda bank, score: (bank, score.half()),
    "strided scores": lambda bank, score: (bank, torch.stack([score, score], 1)[:, 0]),
    "a negated bank": lambda bank, score: (torch._neg_view(bank), score),
    "a class of its own": lambda bank, score: (bank.as_subclass(type("Own", (torch.Tensor,), {})), score),
}
AROUND = {
    "inference mode": torch.inference_mode,
    "a mode": Mode,
    "direct calls switched off": _direct.switched_off,
}


@pytest.mark.parametrize("name", [*UNUSUAL, *AROUND])
def test_what_is_unusual_goes_pythons_way(name, spy):
    banks, scores = [randn(3, 8), randn(3, 4)], [randn(3), randn(3)]
    banks[1], scores[1] = UNUSUAL.get(name, lambda *given: given)(banks[1], scores[1])
    for _ in range(2):
        with AROUND.get(name, contextlib.nullcontext)():
            got = merge_banks(banks, scores, backend="cuda")
        assert "merge_banks" not in spy.taken
        for out, bank, score in zip(got, banks, scores, strict=True):
            torch.testing.assert_close(out, merge_experts(bank, score, backend="reference"))


def test_autocast_changes_nothing(spy):
    banks = [randn(3, 8), randn(3, 4)]
    want = merge_banks(banks, [None] * 2, backend="cuda")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = merge_banks(banks, [None] * 2, backend="cuda")
    assert spy.taken == ["merge_banks"] * 2
    assert all(map(torch.equal, got, want))


def test_a_dual_bank_goes_pythons_way(spy):
    bank, places = randn(2, 3), spy.places([(3,)], [0], 4)
    assert spy.merge_banks(places, [bank], [None]) is not None
    with torch.autograd.forward_ad.dual_level():
        number = torch.autograd.forward_ad.make_dual(bank, torch.ones_like(bank))
        assert spy.merge_banks(places, [number], [None]) is None


def test_places_are_asked_for_whole():
    node = _node.loaded()
    results = Results([torch.Size(shape[1:]) for shape in SHAPES], torch.float32, torch.device(DEVICE))
    memory = torch.arange(results.elements, dtype=torch.float32, device=DEVICE)
    places = results._in_node(node)
    for mine, theirs in zip(node.split(places, memory), results._split(memory), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() == theirs.data_ptr()
        assert mine.untyped_storage().data_ptr() == memory.data_ptr()
    wrong = memory[:-1], memory.view(1, -1), torch.stack([memory, memory], 1)[:, 0], memory.clone().requires_grad_()
    assert all(node.split(places, t) is None for t in (*wrong, None, 3))
    for banks, scores in (([], []), ([memory[None]], [None]), ([None] * len(SHAPES), [None] * len(SHAPES))):
        assert node.merge_banks(places, banks, scores) is None
    for shapes, offsets, elements in (([(3,)], [2], 4), ([(3,)], [-1], 4), ([(3,)], [], 4), ([("a",)], [0], 4)):
        with pytest.raises(RuntimeError, match="places: expected"):
            node.places(shapes, offsets, elements)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        node.split(object(), memory)
