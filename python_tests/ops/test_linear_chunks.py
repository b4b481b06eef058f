"""linear_adamix_loss's chunks: how many rows, the products as a GPU takes them, and the launches that are counted."""

import contextlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from linear_cases import as_on_a_gpu, check_products
from torch.utils._python_dispatch import TorchDispatchMode

from adamix_kernels import linear_adamix_loss
from adamix_kernels.ops.consistency import _chunk_size, _chunks
from adamix_kernels.ops.consistency.signatures import Linear
from benchmarks import linear_share

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PRODUCTS = {"mm", "bmm", "addmm"}
# Neither launches anything: new memory, and views of it.
FREE = {"empty", "new_empty", "empty_like", "detach", "alias"}


def test_a_cpu_takes_64_mib_of_float32_logits():
    for vocab in (3, 1000, 50257, 2**23 + 1):
        pairs = _chunk_size.pairs_a_chunk(10**6, vocab, 64, 4, True, CPU)
        assert pairs == max(1, 64 * 2**20 // (8 * vocab) // (8 if pairs > 8 else 1) * (8 if pairs > 8 else 1))
    assert _chunk_size.pairs_a_chunk(5, 3, 64, 4, True, CPU) > 5


@pytest.mark.parametrize(("trained", "inside"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("width", [64, 768, 2048, 8192])
@pytest.mark.parametrize("gib", [4, 16, 80])
def test_a_gpus_chunks_are_even_and_fit_its_memory(gib, width, trained, inside, monkeypatch):
    monkeypatch.setattr(_chunk_size, "_memory", lambda _: gib * 2**30)
    for vocab in (3, 50257, 128256, 2**24):
        for pairs in (1, 37, 4096, 8192, 10**6):
            taken = _chunk_size.pairs_a_chunk(pairs, vocab, width, 2, trained, GPU, inside)
            assert taken == 1 or 2 * taken * vocab * 2 <= gib * 2**30 // 256
            assert taken <= _chunk_size.wanted(vocab, width, trained, inside)
            chunks = -(-pairs // taken)
            # No chunk is so small that a product of few rows reads the whole head again.
            assert chunks == 1 or taken < 16 or pairs - (chunks - 1) * taken > taken - 8 * chunks
    assert _chunk_size.wanted(50257, width, True) >= _chunk_size.wanted(50257, width, False)
    assert _chunk_size.wanted(50257, width, trained, True) <= _chunk_size.wanted(50257, width, trained)
    assert _chunk_size.wanted(50257, 2 * width, trained) <= _chunk_size.wanted(50257, width, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_the_products_of_a_gpu_give_what_the_whole_logits_give(train_head, with_bias, dtype, monkeypatch):
    as_on_a_gpu(monkeypatch)
    check_products("reference", "cpu", train_head, with_bias, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_adds_to_the_sum_gives_what_the_whole_logits_give(dtype, monkeypatch):
    """A CPU has no such product of torch's: the same, in float32."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(_chunks, "adds_inside", lambda *_: True)
    added = []

    def add(total, left, right, adds):
        added.append((total.dtype, left.dtype, right.dtype, left.shape[1], adds))
        # What the first finds there is not its business.
        total.fill_(torch.nan) if not adds else None
        total.addmm_(left.float(), right.float(), beta=int(adds))

    monkeypatch.setattr(_chunks, "add_product", add)
    check_products("reference", "cpu", True, True, dtype)
    assert added == [(torch.float32, dtype, dtype, rows, n > 0) for n, rows in enumerate((8, 8, 8, 6))]


def test_without_rows_the_heads_gradient_is_zero_where_products_add(monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(_chunks, "adds_inside", lambda *_: True)
    hidden, head = torch.ones(0, 5, 8, dtype=torch.bfloat16), torch.ones(37, 8, dtype=torch.bfloat16)
    loss = linear_adamix_loss(hidden, head.requires_grad_(), torch.zeros(0, 5, dtype=torch.long)).loss
    (grad,) = torch.autograd.grad(loss, head)
    assert loss == 0
    assert grad.eq(0).all()


def test_which_products_add_to_a_sum_of_float32(monkeypatch):
    """What a GPU is asked for is what torch's own shape rules take; where it refuses, the sum stays beside."""
    total, factor = torch.empty(3, 4, device="meta"), torch.empty(3, 3, dtype=torch.bfloat16, device="meta")
    with contextlib.suppress(TypeError):
        # TypeError: a torch without it.
        for adds in (False, True):
            _chunks.add_product(total, factor, factor.new_empty(3, 4), adds)
    assert not _chunks.adds_inside(CPU, torch.bfloat16)

    def refuses(*_):
        raise RuntimeError("self and mat2 must have the same dtype")

    def knows_no_such_argument(*_):
        raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")

    def product_of(rounded=False, rounds=False, turned=False, wipes=True):
        def product(total, left, right, adds):
            made = (left.float().t() if turned else left.float()) @ right.float()
            made = made.to(left.dtype).float() if rounded else made
            total.copy_(made + total if adds or not wipes else made)
            if rounds:
                total.copy_(total.to(left.dtype))

        return product

    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(_chunks, "add_product", product_of())
        assert _chunks._adds_rightly(CPU, dtype)
        wrong = [product_of(rounded=True), product_of(rounds=True), product_of(turned=True), product_of(wipes=False)]
        for product in (*wrong, refuses, knows_no_such_argument, lambda *_: None):
            monkeypatch.setattr(_chunks, "add_product", product)
            assert not _chunks._adds_rightly(CPU, dtype)


def test_a_gpu_is_asked_once_and_never_while_a_graph_is_captured(monkeypatch):
    asked, capturing = mock.Mock(return_value=True), mock.Mock(return_value=True)
    monkeypatch.setattr(_chunks, "_adds_rightly", asked)
    monkeypatch.setattr(_chunks, "_capturing", capturing)
    monkeypatch.setattr(_chunks, "_ADDS", {})
    # Before anything was asked: the safe way, and nothing is kept.
    assert not _chunks.adds_inside(GPU, torch.bfloat16)
    asked.assert_not_called()
    capturing.return_value = False
    assert _chunks.adds_inside(GPU, torch.bfloat16)
    capturing.return_value = True
    assert _chunks.adds_inside(GPU, torch.bfloat16)
    asked.assert_called_once_with(GPU, torch.bfloat16)
    assert not _chunks.adds_inside(GPU, torch.float32)
    assert not _chunks.adds_inside(GPU, torch.float16)
    asked.return_value = capturing.return_value = False
    assert not _chunks.adds_inside(GPU, torch.float16)
    assert asked.call_count == 2


class Launches(TorchDispatchMode):
    """Names of the ops that would launch something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.partition("::")[2]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if name not in FREE and not views:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def launched(pairs, chunk_rows, trained):
    """(products, other launches) of a forward, where a chunk's loss is one launch."""
    hidden, head = torch.randn(2 * pairs, 8), torch.randn(37, 8)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    rows = torch.zeros(2, pairs)
    losses = []

    def chunk(_, logits, labels, counted, selected, factors, need_grad):
        losses.append(logits)
        assert logits.stride() == (64, 1)
        here = rows[:, : labels.shape[0]]
        return _chunks.Chunk(here[0], here[1], logits)

    labels = torch.zeros(pairs, dtype=torch.long)
    with Launches() as seen:
        given = hidden, head, None, labels, None, None, 1.0, -100, 0.0, True, chunk_rows, True, trained, False
        _chunks.linear_loss(chunk, Linear(*given))
    products = sum(name in PRODUCTS for name in seen.names)
    return products, len(seen.names) - products + len(losses)


@pytest.mark.parametrize("trained", [False, True])
def test_a_chunk_launches_what_the_count_says(trained, monkeypatch):
    as_on_a_gpu(monkeypatch)
    (few, one), (many, five) = launched(20, 20, trained), launched(20, 4, trained)
    assert (few, many) == (3, 15) if trained else (2, 10)
    # A CPU's sum is beside its product.
    per_chunk = linear_share.PER_CHUNK[trained] + linear_share.SUM * trained
    assert (five - one) / 4 == per_chunk
    # And begins with zeros.
    assert one - per_chunk == linear_share.PER_CALL[trained] + trained


def test_the_count_beside_the_goal():
    """At most 10% outside the products of 2,048 features; of 768 15% where matrix units do not outrun the memory."""
    for gpu in linear_share.GPUS:
        for trained in (False, True):
            given = gpu, 8192, 50257, 768, trained
            wide = linear_share.share(gpu, 8192, 50257, 2048, trained)
            narrow, most = linear_share.share(*given), linear_share.best(*given)
            assert wide.outside <= 0.10
            assert narrow.outside <= (0.155 if gpu.name in ("V100", "A100-80") else 0.21)
            assert narrow.rest <= 0.05 * narrow.seconds
            # No chunk would be done much sooner.
            assert narrow.seconds <= 1.05 * most.seconds
            assert narrow.outside < linear_share.before(*given).outside
            assert not trained or narrow.outside < linear_share.share(*given, inside=False).outside
    lines = list(linear_share.table(8192, 50257))
    assert len(lines) == 2 + 4 * len(linear_share.GPUS)
    page = Path(linear_share.__file__).parent.parent / "docs" / "linear_loss.md"
    assert "\n".join(lines) in page.read_text()
    parts = list(linear_share.parts(8192, 50257))
    assert len(parts) == 2 + 2 * len(linear_share.GPUS)
    assert "\n".join(parts) in page.read_text()


def test_logits_that_fit_l2_are_read_there():
    """All of them, in the time of L2, where it is endless; none where it is nothing."""
    gpu = linear_share.GPUS[2]
    given = 512, 8192, 50257, 768, False
    endless, nothing = (linear_share.with_chunks(replace(gpu, l2=size), *given) for size in (1e15, 1.0))
    logits = 2 * 2 * 8192 * 50257
    assert endless.found == pytest.approx(1)
    assert endless.loss == pytest.approx(logits / gpu.l2_rate, rel=1e-3)
    assert nothing.found == pytest.approx(0)
    assert nothing.loss == pytest.approx(2 * logits / (linear_share.LOSS_SHARE * gpu.copy), rel=0.02)


@pytest.mark.parametrize("trained", [False, True])
def test_from_which_width_on_the_loss_takes_little(trained):
    gpu = linear_share.GPUS[2]
    width = linear_share.least_width(gpu, trained)
    logit, products = 4 / gpu.copy, (6 if trained else 4) * width / gpu.rate
    assert logit / (logit + products) == pytest.approx(0.15)
