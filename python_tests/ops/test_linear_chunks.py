"""linear_adamix_loss's chunks: how many rows, the products as a GPU takes them, and the launches that are counted."""

import pytest
import torch
from linear_cases import as_on_a_gpu, check_products
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("width", [64, 768, 2048, 8192])
@pytest.mark.parametrize("gib", [4, 16, 80])
def test_a_gpus_chunks_are_even_and_fit_its_memory(gib, width, trained, monkeypatch):
    monkeypatch.setattr(_chunk_size, "_memory", lambda _: gib * 2**30)
    for vocab in (3, 50257, 128256, 2**24):
        for pairs in (1, 37, 4096, 8192, 10**6):
            taken = _chunk_size.pairs_a_chunk(pairs, vocab, width, 2, trained, GPU)
            assert taken == 1 or 2 * taken * vocab * 2 <= gib * 2**30 // 256
            assert taken <= _chunk_size.wanted(vocab, width, trained)
            chunks = -(-pairs // taken)
            # No chunk is so small that a product of few rows reads the whole head again.
            assert chunks == 1 or taken < 16 or pairs - (chunks - 1) * taken > taken - 8 * chunks
    assert _chunk_size.wanted(50257, width, True) >= _chunk_size.wanted(50257, width, False)
    assert _chunk_size.wanted(50257, 2 * width, trained) <= _chunk_size.wanted(50257, width, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_the_products_of_a_gpu_give_what_the_whole_logits_give(train_head, with_bias, dtype, monkeypatch):
    as_on_a_gpu(monkeypatch)
    check_products("reference", "cpu", train_head, with_bias, dtype)


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

    with Launches() as seen:
        labels = torch.zeros(pairs, dtype=torch.long)
        given = hidden, head, None, labels, None, None, 1.0, -100, 0.0, True, chunk_rows, True, trained, False
        _chunks.linear_loss(chunk, Linear(*given))
    products = sum(name in PRODUCTS for name in seen.names)
    return products, len(seen.names) - products + len(losses)


@pytest.mark.parametrize("trained", [False, True])
def test_a_chunk_launches_what_the_count_says(trained, monkeypatch):
    as_on_a_gpu(monkeypatch)
    (few, one), (many, five) = launched(20, 20, trained), launched(20, 4, trained)
    assert (few, many) == (3, 15) if trained else (2, 10)
    assert (five - one) / 4 == linear_share.PER_CHUNK[trained]
    assert one - linear_share.PER_CHUNK[trained] <= linear_share.PER_CALL


def test_the_count_beside_the_goal():
    """At most 15% outside the products with a frozen head of 2,048 features; of 768, the loss's own traffic is more."""
    for gpu in linear_share.GPUS:
        wide, narrow = (linear_share.share(gpu, 8192, 50257, width, False) for width in (2048, 768))
        # B200 aside, of which nothing is measured.
        assert wide.outside <= (0.16 if gpu.name == "B200" else 0.15)
        assert narrow.rest <= 0.06 * (narrow.products + narrow.loss + narrow.rest)
        for width in (768, 2048):
            for trained in (False, True):
                now, then = (linear_share.share(gpu, 8192, 50257, width, trained, before) for before in (False, True))
                assert now.outside < then.outside
    lines = list(linear_share.table(8192, 50257))
    assert len(lines) == 2 + 4 * len(linear_share.GPUS)


@pytest.mark.parametrize("trained", [False, True])
def test_from_which_width_on_the_loss_takes_little(trained):
    gpu = linear_share.GPUS[2]
    width = round(linear_share.least_width(gpu, trained))
    found = linear_share.share(gpu, 8192, 50257, width, trained)
    loss = found.loss * linear_share.LOSS_SHARE
    assert loss / (loss + found.products) == pytest.approx(0.15, rel=0.01)
