"""Autograd's nodes in C++ (csrc/autograd): the bits of those in Python, and calls that they must leave alone."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import shutil
import threading

import pytest
import torch
from cuda_host import DEVICE, needs_cuda
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

needs_cuda()

from adamix_kernels import _build, _extension, routed_adapter, routed_lora
from adamix_kernels.commands import env
from adamix_kernels.ops import _direct, _node
from adamix_kernels.ops.routed_adapter.api import routed_by_pass as adapter_by_pass
from adamix_kernels.ops.routed_lora.api import routed_by_pass as lora_by_pass

ADAPTER = ("RoutedAdapterBackward",)
LORA = ("RoutedLoRABackward",)


def rand(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(DEVICE)


def adapter_case(kind="passes", residual="own"):
    banks = rand(3, 4, 10), rand(3, 4), rand(2, 10, 4), rand(2, 10)
    x = rand(4, 5, 10)
    passes = 2 if kind == "passes" else 0
    shape = {"passes": (2,), "sample": (4,), "token": (4, 5)}[kind]
    index = [(torch.arange(torch.Size(shape).numel(), device=DEVICE).view(shape) % m) for m in (3, 2)]
    other = rand(4, 5, 10, seed=7)

    def call(x, wd, bd, wu, bu, other):
        added = {"own": other, "input": x, "none": None}[residual]
        return adapter_by_pass(x, wd, bd, wu, bu, *index, passes, added, "gelu", "cuda")

    return call, [x, *banks, other]


def lora_case(kind="passes", inplace=False, consumed=False, dropout=0.0):
    x, base = rand(4, 5, 10), rand(4, 5, 18, seed=3)
    banks = rand(3, 4, 10), rand(1, 12, 2)
    passes = 2 if kind == "passes" else 0
    index = torch.tensor([2, 0] if passes else [2, 0, 1, 1], device=DEVICE)

    def call(x, a, b, base):
        base = base * 1.0 if inplace else base
        if consumed:
            base = base.view(20, 18).clone().view(4, 5, 18)  # as Conv1D gives it
        return lora_by_pass(
            x, a, b, index, None, passes, base, 0.5, 2, (0, 12), dropout, 11 if dropout else None, inplace, "cuda",
            consumed,
        )  # fmt: skip

    return call, [x, *banks, base]


CASES = {
    "adapter passes": (adapter_case, ("passes", "own")),
    "adapter passes, x": (adapter_case, ("passes", "input")),
    "adapter sample, x": (adapter_case, ("sample", "input")),
    "adapter token": (adapter_case, ("token", "none")),
    "lora passes": (lora_case, ("passes",)),
    "lora sample": (lora_case, ("sample",)),
    "lora in place": (lora_case, ("sample", True)),
    "lora passes, in place": (lora_case, ("passes", True)),
    "lora consumed": (lora_case, ("passes", True, True)),
}


def node_name(out):
    return out.grad_fn.name()


def gradients(call, given, needed=None):
    leaves = [t.clone().requires_grad_(needed is None or n in needed) for n, t in enumerate(given)]
    out = call(*leaves)
    (out * rand(*out.shape, seed=5)).sum().backward()
    return out, [t.grad for t in leaves if t.requires_grad]


@pytest.fixture(autouse=True)
def loaded():
    call, given = adapter_case()
    call(*given)
    call, given = lora_case()
    call(*given)
    assert _node.NODE.module is not None, "the build puts the module beside the library"


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_nodes_in_python(name, monkeypatch):
    make, options = CASES[name]
    call, given = make(*options)
    out, grads = gradients(call, given)
    assert node_name(out) in (*ADAPTER, *LORA)
    for needed in ((0,), (1,), (2, 3), *([(len(given) - 1,)] if grads[-1] is not None else [])):
        part, some = gradients(call, given, needed)
        assert torch.equal(part, out)
        assert all(one is None or torch.equal(one, grads[n]) for n, one in zip(needed, some))
    with torch.no_grad():
        assert torch.equal(call(*given), out)
    monkeypatch.setattr(_node.NODE, "module", None)
    want, expected = gradients(call, given)
    assert node_name(want) not in (*ADAPTER, *LORA)
    assert torch.equal(out, want)
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(grads, expected))


def test_dropout_draws_the_same_seed_from_the_generator(monkeypatch):
    _, (x, a, b, base) = lora_case()
    index = torch.tensor([2, 0, 1, 1], device=DEVICE)
    results = []
    for module in (_node.NODE.module, None):
        monkeypatch.setattr(_node.NODE, "module", module)
        torch.manual_seed(4)
        options = dict(base=base, groups=2, output_offsets=(0, 12), dropout_p=0.4, backend="cuda")
        results.append((routed_lora(x, a, b, index, None, **options), torch.rand(3, device=DEVICE)))
    assert all(torch.equal(one, other) for one, other in zip(*results))


class Sub(torch.Tensor):
    pass


def served_by_node(call, given):
    """Whether the node took the call."""
    leaves = [t.detach().requires_grad_() for t in given]
    return node_name(call(*leaves)) in (*ADAPTER, *LORA)


def test_watched_calls_go_the_long_way(monkeypatch):
    call, given = lora_case()
    assert served_by_node(call, given)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not served_by_node(call, given)
    with _direct.switched_off():
        assert not served_by_node(call, given)
    with FlopCounterMode(display=False):
        assert not served_by_node(call, given)
    with torch.device(DEVICE):  # a function mode
        assert not served_by_node(call, given)
    with torch.profiler.profile():
        assert not served_by_node(call, given)
    monkeypatch.setenv("ADAMIX_CHECK", "1")
    assert not served_by_node(call, given)
    monkeypatch.delenv("ADAMIX_CHECK")
    _direct.forget_all()
    assert not served_by_node(call, given)  # what is found out now is found out anew
    assert served_by_node(call, given)


def test_tensors_of_other_kinds_go_the_long_way():
    call, given = lora_case()
    module = _node.NODE.module
    index = torch.tensor([2, 0, 1, 1], device=DEVICE)

    def asked(x, a, b, base, index=index, backend="cuda"):
        return module.lora(x, a, b, index, None, base, None, 0.5, 2, (0, 12), 0.0, False, False, 0, backend)

    x, a, b, base = given
    assert asked(x, a, b, base) is not None
    assert asked(x.as_subclass(Sub), a, b, base) is None
    assert asked(x, torch._neg_view(a), b, base) is None
    assert asked(x.double(), a, b, base) is None
    assert asked(x[:, :, :8], a, b, base) is None
    assert asked(x, a, b, base[:2]) is None
    assert asked(x, a, b, base, index + 2) is None or DEVICE != "cpu"
    assert asked(x, a, b, base, index.float()) is None
    assert asked(x[:0], a, b, base[:0], index[:0]) is None
    assert asked(x, a, b, base, backend="triton") is None
    with pytest.raises(IndexError, match="a_index"):
        routed_lora(x, a, b, index + 2, None, base=base, groups=2, output_offsets=(0, 12), backend="cuda")
    with pytest.raises(ValueError, match="output_offsets"):
        routed_lora(x, a, b, index, None, base=base, groups=2, output_offsets=(0, 1), backend="cuda")
    with pytest.raises((TypeError, ValueError), match="inplace"):
        routed_lora(x, a, b, index, None, base=base, groups=2, output_offsets=(0, 12), inplace=2, backend="cuda")
    with pytest.raises(RuntimeError, match="setup_context"):  # as ever: the ops know no transforms
        torch.func.grad(lambda x: call(x, a, b, base).sum())(x)


def test_what_may_not_be_overwritten_is_refused_as_ever():
    _, (x, a, b, base) = lora_case()
    index = torch.tensor([2, 0, 1, 1], device=DEVICE)
    run = lambda base, x=x: routed_lora(  # noqa: E731
        x.requires_grad_(), a, b, index, None, base=base, groups=2, output_offsets=(0, 12), inplace=True, backend="cuda"
    )
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        run(base.clone().requires_grad_())
    with pytest.raises(ValueError, match="base"):
        run(rand(4, 5, 30)[..., :18])
    with pytest.raises(ValueError, match="base"):
        run(x[..., :1].expand(4, 5, 18))
    # Whoever saved base's old value finds out.
    leaf = base.clone().requires_grad_()
    middle = leaf * 2
    squared = middle.pow(2)
    out = run(middle)
    assert out is middle
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared.sum() + out.sum()).backward()
    view = (leaf * 2).view(20, 18).view(4, 5, 18)
    assert torch.equal(run(view), out)
    assert torch.equal(view, out)


@pytest.mark.parametrize(("make", "options"), [*CASES.values()], ids=[*CASES])
def test_gradients_that_are_not_memory_of_their_own(make, options, monkeypatch):
    call, given = make(*options)
    results = []
    for module in (_node.NODE.module, None):
        monkeypatch.setattr(_node.NODE, "module", module)
        leaves = [t.clone().requires_grad_() for t in given]
        out = call(*leaves)
        gradient = torch.stack([rand(*out.shape, seed=n) for n in (5, 6)])
        found = []
        for batched, g in (
            (False, TwoTensor(*(g.clone() for g in gradient))),
            (True, gradient),
            (False, torch._neg_view(gradient[0])),
        ):
            try:
                grads = torch.autograd.grad(
                    out, leaves, g, is_grads_batched=batched, retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                found.append(str(error))
            else:
                found += [
                    part for t in grads if t is not None for part in ((t.a, t.b) if type(t) is TwoTensor else (t,))
                ]
        results.append(found)
    node, python = results
    assert all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(node, python, strict=True))


def test_a_second_derivative_is_refused_and_graphs_are_released():
    for make in (adapter_case, lora_case):
        call, given = make()
        leaves = [t.clone().requires_grad_() for t in given]
        weight = rand(*call(*leaves).shape).requires_grad_()
        (first,) = torch.autograd.grad(call(*leaves), leaves[:1], weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
        out = call(*leaves)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()
        leaves = [t.clone().requires_grad_() for t in given]
        out = call(*leaves)
        with torch.no_grad():
            leaves[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_saved_tensor_hooks(reentrant):
    call, given = adapter_case()
    _, want = gradients(call, given)
    _, got = gradients(lambda *leaves: checkpoint(call, *leaves, use_reentrant=reentrant), given)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    # What a hook gives back need not be memory that says what it holds.
    lazily = lambda t: torch._neg_view(-t) if t.is_floating_point() else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lazily):
        _, got = gradients(call, given)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        _, got = gradients(call, given)
    assert len(packed) >= 6
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_backward_that_a_mode_watches_is_seen_as_the_public_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    call, given = lora_case()
    _, want = gradients(call, given)
    leaves = [t.clone().requires_grad_() for t in given]
    out = call(*leaves)
    with Watch():
        got = torch.autograd.grad((out * rand(*out.shape, seed=5)).sum(), leaves)
    assert "adamix_kernels.routed_lora_backward.default" in seen
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_the_backward_of_a_plan_goes_to_other_kernels_that_auto_has_chosen_since():
    x, a, b, t, dy = rand(4, 5, 10), rand(3, 4, 10), rand(1, 6, 4), rand(4, 5, 4), rand(4, 5, 6)
    index = torch.tensor([2, 0, 1, 1], device=DEVICE)
    arguments = dy, x, t, a, b, index, None, None, True, True, True, 0.5, 1, [0], 0.0
    got = _node._backward(4, 0, "cuda", *arguments)  # as csrc/autograd/plans.cpp asks
    want = torch.ops.adamix_kernels.routed_lora_backward(*arguments, "cuda")
    assert all(map(torch.equal, got, want))


def test_threads():
    call, given = adapter_case()
    _, want = gradients(call, given)
    wrong = []

    def work():
        for _ in range(20):
            _, got = gradients(call, given)
            if not all(torch.equal(a, b) for a, b in zip(got, want)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_wrong_dtype_of_a_bank_is_named_though_its_like_was_served():
    _, (x, wd, bd, wu, bu, _) = adapter_case()
    index = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    routed_adapter(x, wd, bd, wu, bu, index, index, backend="cuda")
    with pytest.raises(TypeError, match="down_bias"):
        routed_adapter(x, wd, bd.double(), wu, bu, index, index, backend="cuda")
    with pytest.raises(ValueError, match="activation"):
        routed_adapter(x, wd, bd, wu, bu, index, index, activation="tanh", backend="cuda")


def test_a_module_of_other_sources_is_refused_in_words(tmp_path, monkeypatch):
    (built,) = _extension.folder().glob(f"_node-{torch.__version__}*")
    assert _node.find.__wrapped__()[1] is None
    shutil.copy(built, tmp_path)
    monkeypatch.setattr(_extension, "folder", lambda: tmp_path)
    assert _node.find.__wrapped__()[1] is None
    monkeypatch.setattr(_build, "node_sources", lambda csrc: "0123456789abcdef")  # csrc/ after a `git pull`
    module, reason = _node.find.__wrapped__()
    assert module is None
    assert reason.startswith(f"{built.name} was built from another csrc/; `python -m adamix_kernels._build ")
    monkeypatch.setattr(_node, "find", _node.find.__wrapped__)
    with pytest.warns(UserWarning, match="autograd's nodes stay in Python: .* builds it anew"):
        assert _node._load.__wrapped__() is None
    assert f"autograd's nodes in Python ({reason})" in env.in_words(env.describe())
    (tmp_path / built.name).unlink()
    assert _node.find() == (None, None)


def test_a_module_that_cannot_be_loaded_is_refused_in_words(tmp_path, monkeypatch):
    (built,) = _extension.folder().glob(f"_node-{torch.__version__}*")
    monkeypatch.setattr(_extension, "folder", lambda: tmp_path)
    (tmp_path / built.name).write_bytes(b"no library")
    module, reason = _node.find.__wrapped__()
    assert module is None
    assert built.name in reason
    assert "\n" not in reason


def test_other_files_in_the_folder_are_no_sources(tmp_path):
    folder = tmp_path / "autograd"
    folder.mkdir()
    (tmp_path / "entries.h").write_text("")
    (folder / "a.cpp").write_text("")
    before = _build.node_sources(tmp_path)
    (folder / "__pycache__").mkdir()
    (folder / "a.cpp.orig").write_text("")
    assert _build.node_sources(tmp_path) == before
    (folder / "a.h").write_text("")
    assert _build.node_sources(tmp_path) != before
