"""The reference losses take rows in blocks: every row once, and the same bits whatever the blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import _blocks

ROWS = [(7,), (3, 5), (2, 1, 4), (1,)]


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 40))
def test_blocks_cover_every_row_once_and_are_no_larger_than_asked(rows, pairs):
    times = torch.zeros(rows)
    for at in _blocks.blocks(rows, pairs):
        assert times[at].numel() <= pairs
        times[at] += 1
    assert (times == 1).all()


def test_a_thread_has_a_row_however_long():
    cpu = torch.device("cpu")
    assert _blocks.pairs_at_once(2**20, cpu) == torch.get_num_threads()
    assert _blocks.pairs_at_once(2**10, cpu) == 2**7 * torch.get_num_threads()
    assert _blocks.pairs_at_once(2**10, torch.device("cuda")) == 2**16


@pytest.fixture(params=[1, 2, 4])
def in_blocks(request, monkeypatch):
    """A function that calls another with blocks of few rows."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(_blocks, "pairs_at_once", lambda _vocab, _device: request.param)
            return function()

    return call


def same(in_blocks, loss, *leaves):
    """Asserts equal losses and gradients; loss() -> tensors, the first is differentiated."""

    def outcome():
        outputs = loss()
        return *outputs, *torch.autograd.grad(outputs[0].sum(), leaves)

    for whole, parts in zip(outcome(), in_blocks(outcome), strict=True):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("rows", [(), *ROWS], ids=str)
def test_consistency_loss(in_blocks, rows, reduction, detach):
    a, b = (torch.randn(*rows, 11, requires_grad=True) for _ in range(2))
    mask = torch.rand(rows) < 0.7
    for masked in (None, mask):
        options = dict(mask=masked, reduction=reduction, detach_target=detach)
        same(in_blocks, lambda: (consistency_loss(a, b, **options),), a, b)  # noqa: B023


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_adamix_loss(in_blocks, rows, detach):
    logits = torch.randn(2 * rows[0], *rows[1:], 11, requires_grad=True)
    labels = torch.randint(11, rows)
    labels[torch.rand(rows) < 0.3] = -100
    options = dict(detach_target=detach, label_smoothing=0.1)
    same(in_blocks, lambda: tuple(adamix_loss(logits, labels, **options)), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adamix_loss(in_blocks, dtype):
    hidden, head = (torch.randn(n, 4).to(dtype).requires_grad_() for n in (14, 11))
    bias = torch.randn(11).to(dtype).requires_grad_()
    labels = torch.randint(11, (7,))

    def loss():
        return tuple(linear_adamix_loss(hidden, head, labels, bias=bias, chunk_rows=5))

    same(in_blocks, loss, hidden, head, bias)
