"""The bytes each public op allocates at its peak, and the formulas its docstring has for them."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

from adamix_kernels import functional as ak
from adamix_kernels.ops import _routed_matmul
from adamix_kernels.ops.consistency._blocks import pairs_at_once
from benchmarks.bench_linear_memory import peak_bytes

_LINE = re.compile(
    r"(?P<title>(?:triton|cuda|reference)[^:`]*): forward `(?P<forward>[^`]+)`, backward `(?P<backward>[^`]+)`"
)


@dataclass(frozen=True)
class Peak:
    """One call: the public function, the title of its formulas in the docstring, the sizes those name, the call.

    call(backend): the output; leaves: what gets a gradient.
    """

    op: Callable
    title: str
    sizes: dict[str, int]
    leaves: tuple[torch.Tensor, ...]
    call: Callable[[str], torch.Tensor] = field(repr=False)

    def served_by(self, backend: str) -> bool:
        return backend in re.findall(r"\w+", self.title)


def formulas(op: Callable) -> dict[str, tuple[str, str]]:
    """title -> (forward, backward): the formulas in the docstring of a public function."""
    words = " ".join((op.__doc__ or "").split())
    return {m["title"]: (m["forward"], m["backward"]) for m in _LINE.finditer(words)}


def documented(peak: Peak) -> tuple[float, float]:
    """(forward, backward) in bytes. Raises KeyError where the docstring has no such line or names another size."""
    forward, backward = formulas(peak.op)[peak.title]
    return tuple(eval(text, {"__builtins__": {}}, dict(peak.sizes)) for text in (forward, backward))


def measured(peak: Peak, backend: str) -> tuple[int, int]:
    """(forward, backward): most bytes that PyTorch's allocator had handed out, beyond those before the step."""
    made: list = []
    gc.collect()  # what is freed meanwhile would count against the peak
    way = _as_on_a_gpu() if "on a GPU" in peak.title else contextlib.nullcontext()
    with _freeing_interpreter(backend), way:
        forward = peak_bytes(lambda: made.append(peak.call(backend)))
        out = made.pop()
        incoming = torch.full_like(out, 1.0 if out.dim() == 0 else 0.5)
        backward = peak_bytes(lambda: made.extend(torch.autograd.grad(out, peak.leaves, incoming)))
    return forward, backward


@contextlib.contextmanager
def _freeing_interpreter(backend: str) -> Iterator[None]:
    """Triton's interpreter leaves a launch's arguments in reference cycles: collected here after every launch."""
    if backend != "triton":
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_and_collect(self, *args, **options):
        launch(self, *args, **options)
        del args, options
        gc.collect()

    with mock.patch.object(GridExecutor, "__call__", launch_and_collect):
        yield


def _as_on_a_gpu() -> contextlib.AbstractContextManager:
    """The reference takes the way that does not read the routing."""
    return mock.patch.object(_routed_matmul, "reads_routing", return_value=False)


def within(share: float, measured_bytes: tuple[int, int], documented_bytes: tuple[float, float]) -> bool:
    """Whether both directions differ by at most `share` of what is documented for them; 0: of the other direction's."""
    most = max(documented_bytes)
    return all(abs(m - d) <= share * (d or most) for m, d in zip(measured_bytes, documented_bytes, strict=True))


def peaks(backend: str, scale: int = 1) -> Iterator[Peak]:
    """The calls to measure on a backend; scale: multiplies what a formula is large in."""
    for peak in (*_routed(scale), *_merges(scale), *_losses(scale)):
        if peak.served_by(backend):
            yield peak


def _leaf(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _routed(scale: int) -> Iterator[Peak]:
    batch, tokens, hidden, rank, experts = 4, 32 * scale, 64 * scale, 8, 4
    rows = {"[B]": (batch,), "[B, S]": (batch, tokens)}
    sizes = dict(B=batch, S=tokens, r=rank, e=4)

    def adapter(title, kind, dtype=torch.float32):
        x = _leaf(batch, tokens, hidden, dtype=dtype)
        shapes = (experts, rank, hidden), (experts, rank), (experts, hidden, rank), (experts, hidden)
        banks = [_leaf(*shape, dtype=dtype) for shape in shapes]
        i, j = (torch.randint(experts, rows[kind]) for _ in range(2))
        mine = sizes | dict(H=hidden, Hout=hidden, Md=experts, Mu=experts, e=dtype.itemsize, T=_busiest(i, j))
        call = lambda backend: ak.routed_adapter(x, *banks, i, j, residual=x, backend=backend)  # noqa: E731
        return Peak(ak.routed_adapter, title, mine, (x, *banks), call)

    def lora(title, kind, dropout_p=0.0, dtype=torch.float32):
        x, base = (_leaf(batch, tokens, hidden, dtype=dtype) for _ in range(2))
        factors = _leaf(experts, rank, hidden, dtype=dtype), _leaf(experts, hidden, rank, dtype=dtype)
        i, j = (torch.randint(experts, rows[kind]) for _ in range(2))
        mine = sizes | dict(K=hidden, N=hidden, Ma=experts, Mb=experts, e=dtype.itemsize, T=_busiest(i, j))

        def call(backend):
            return ak.routed_lora(x, *factors, i, j, base=base, dropout_p=dropout_p, seed=1, backend=backend)

        return Peak(ak.routed_lora, title, mine, (x, *factors, base), call)

    for op in (adapter, lora):
        yield op("reference, float32, indices [B]", "[B]")
        yield op("reference, float32, indices [B, S], with T tokens at most to an expert", "[B, S]")
        yield op("reference on a GPU, float32, indices [B, S]", "[B, S]")
        yield op("triton, cuda", "[B]", dtype=torch.bfloat16)
    yield lora("reference, float32, indices [B], dropout, K >= N", "[B]", 0.1)
    yield lora("triton, cuda", "[B, S]", 0.1, torch.bfloat16)


def _busiest(*indices: torch.Tensor) -> int:
    """The most samples or tokens that go to one expert."""
    return max(int(index.flatten().bincount().max()) for index in indices)


def _merges(scale: int) -> Iterator[Peak]:
    experts, edge, rank = 4, 64 * scale, 8

    def mean(title, with_scores, dtype=torch.float32):
        bank, scores = _leaf(experts, 2 * edge, edge, dtype=dtype), _leaf(experts)
        leaves = (bank, scores) if with_scores else (bank,)
        sizes = dict(M=experts, D=2 * edge * edge, e=dtype.itemsize)
        return Peak(ak.merge_experts, title, sizes, leaves, lambda backend: ak.merge_experts(*leaves, backend=backend))

    def lora(title):
        leaves = _leaf(edge, edge), _leaf(experts, rank, edge), _leaf(experts, edge, rank)
        sizes = dict(N=edge, K=edge, r=rank, Ma=experts, Mb=experts, e=4)
        call = lambda backend: ak.merge_lora(*leaves, scaling=0.5, backend=backend)  # noqa: E731
        return Peak(ak.merge_lora, title, sizes, leaves, call)

    yield mean("reference, float32", False)
    yield mean("reference, float32, scores", True)
    for dtype in (torch.float32, torch.bfloat16):
        yield mean("triton, cuda", True, dtype)
    yield lora("reference, float32")
    yield lora("triton, float32")
    yield lora("cuda, float32")


def _losses(scale: int) -> Iterator[Peak]:
    rows, classes, width = 32, 2048 * scale, 32
    chunk, at_once = rows // 2, pairs_at_once(classes, torch.device("cpu"))

    def pair(title, dtype, detach=True):
        leaves = _leaf(rows, classes, dtype=dtype), _leaf(rows, classes, dtype=dtype)
        sizes = dict(R=rows, V=classes, e=dtype.itemsize, P=min(rows, at_once))
        call = lambda backend: ak.consistency_loss(*leaves, detach_target=detach, backend=backend)  # noqa: E731
        return Peak(ak.consistency_loss, title, sizes, leaves, call)

    def doubled(title, dtype, detach=True):
        logits, labels = _leaf(2 * rows, classes, dtype=dtype), torch.randint(classes, (rows,))
        sizes = dict(R=rows, V=classes, e=dtype.itemsize, P=min(rows, at_once))
        call = lambda backend: ak.adamix_loss(logits, labels, detach_target=detach, backend=backend).loss  # noqa: E731
        return Peak(ak.adamix_loss, title, sizes, (logits,), call)

    for op in (pair, doubled):
        for dtype in (torch.float32, torch.bfloat16):
            yield op("reference, 4 or 2 bytes, P rows at once", dtype)
            yield op("reference, 4 or 2 bytes, detach_target=False", dtype, False)
            yield op("triton, cuda", dtype)

    for title in ("reference, float32, P rows at once", "triton, cuda, float32"):
        hidden, head = _leaf(2 * rows, width), _leaf(classes, width)
        labels = torch.randint(classes, (rows,))
        sizes = dict(R=rows, V=classes, D=width, C=chunk, P=min(chunk, at_once))
        yield Peak(
            ak.linear_adamix_loss, title, sizes, (hidden, head),
            lambda backend, hidden=hidden, head=head, labels=labels: ak.linear_adamix_loss(
                hidden, head, labels, chunk_rows=chunk, backend=backend
            ).loss,
        )  # fmt: skip
