"""The cases that every backend of merging is compared on."""

import contextlib

import pytest
import torch
from poison import poisoned_memory

import adamix_kernels as ak
from adamix_kernels.functional import merge_experts, merge_lora
from adamix_kernels.modules.adapter import merge_adapters
from adamix_kernels.ops.merge.api import LoraLayer, merge_banks, merge_lora_banks, merge_loras


def experts_on(backend):
    """(bank, dy[, scores]) -> the mean and its gradients."""

    def run(bank, dy, scores=None):
        leaves = [t.detach().requires_grad_() for t in (bank, scores) if t is not None]
        with poisoned_memory(backend != "reference"):
            out = merge_experts(leaves[0], leaves[1] if scores is not None else None, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, dy)

    return run


def lora_on(backend, **options):
    def run(weight, lora_a, lora_b, dy):
        leaves = [t.detach().requires_grad_() for t in (weight, lora_a, lora_b)]
        with poisoned_memory(backend != "reference"):
            out = merge_lora(*leaves, backend=backend, **options)
            return out.detach(), *torch.autograd.grad(out, leaves, dy)

    return run


def lora_case(randn, groups, experts, r, fan, dtype, rows=130, features=45):
    """[weight, lora_a, lora_b, dy] and the keyword arguments of merge_lora; randn(*shape, dtype=) draws."""
    per_group, offsets = 20, tuple(43 * g for g in range(groups))
    weight = randn(*((features, rows) if fan else (rows, features)), dtype=dtype)
    tensors = weight, randn(experts, groups * r, features, dtype=dtype), randn(groups * per_group, r, dtype=dtype)
    options = dict(scaling=1.7, groups=groups, output_offsets=offsets, fan_in_fan_out=fan)
    return [*tensors, randn(*weight.shape, dtype=dtype)], options


def check_whole_model(backend, device, around_merge=contextlib.nullcontext):
    """A model's merge is that of its adapters by the reference, and unmerge brings back every bit.

    Returns what the context around the merge gave.
    """
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    ak.adapt(model, ak.AdaMixConfig(target_modules=["0", "1", "2"], bottleneck=4, share=None)).to(device)
    adapters = [layer.adapter for layer in model]
    for adapter in adapters:
        adapter.backend = backend
        for bank in adapter.banks():
            torch.nn.init.normal_(bank)
        adapter.down_score.data.normal_()
    before = [bank.clone() for adapter in adapters for bank in adapter.banks()]
    with around_merge() as seen:
        ak.merge(model)
    for adapter in adapters:
        adapter.backend = "reference"
    for got, want in zip(model, merge_adapters(adapters), strict=True):
        for mine, theirs in zip(got.adapter.banks(), want.banks(), strict=True):
            torch.testing.assert_close(mine, theirs)
    ak.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(before, (b for layer in model for b in layer.adapter.banks())))
    return seen


def check_lists_that_differ_in_one_thing(backend, randn):
    """merge_banks answers every one of many lists for itself, whatever it was asked before: nothing is taken over.

    randn(*shape, dtype=) draws on the backend's device.
    """
    banks = [randn(4, 6, 8), randn(4, 8), randn(4), randn(4, 6, 8), randn(4, 0)]
    scores = [randn(4) for _ in banks]
    none = [None] * len(banks)

    def with_one(values, at, value):
        return [value if n == at else old for n, old in enumerate(values)]

    other = with_one(banks, 1, randn(4, 8))
    lists = [
        (banks, none),
        (other, none),
        ([bank.half() for bank in banks], none),
        (with_one(banks, 0, randn(4, 8, 6)), none),
        (with_one(banks, 0, banks[0].view(4, 8, 6)), none),
        (with_one(banks, 0, randn(4, 8, 6).transpose(1, 2)), none),
        (with_one(banks, 0, banks[0][:2]), none),
        (with_one(banks, 1, banks[1][:, 1:]), none),
        (banks[::-1], none),
        (banks[:3], none[:3]),
        (banks, scores),
        (banks, scores[::-1]),
        (banks, with_one(none, 3, scores[3])),
        (banks, with_one(none, 0, scores[0])),
        (banks, with_one(scores, 0, scores[0].half())),
        (banks, with_one(scores, 0, scores[0].double())),
        (banks, with_one(scores, 0, torch.stack([scores[0], scores[1]], 1)[:, 0])),
        (with_one(banks, 3, banks[3].requires_grad_()), none),
        (with_one(banks, 3, banks[3].half()), none),
    ]
    for turn in (1, 2):
        for number, (given, weights) in enumerate(lists):
            with poisoned_memory(backend != "reference"):
                got = merge_banks(given, weights, backend=backend)
            for out, bank, score in zip(got, given, weights, strict=True):
                want = merge_experts(bank, score, backend="reference")
                assert not out.requires_grad
                torch.testing.assert_close(out, want.detach(), msg=f"list {number}, turn {turn}")
        # The same addresses hold other numbers now.
        with torch.no_grad():
            for bank in (*banks, *other):
                bank.mul_(2)


def check_results_are_apart(backend, randn):
    """Results may be written in place: none holds an element of another, and those of the op share no memory."""
    banks = [randn(3, 5), randn(3), randn(3, 5), randn(3, 0), randn(3, 2, 2), randn(3)]
    scores = [None] * len(banks)
    first, second = (merge_banks(banks, scores, backend=backend) for _ in range(2))
    for n, out in enumerate(first):
        assert out.shape == banks[n].shape[1:]
        assert out.is_contiguous()
        assert not out._is_view() or backend == "reference"
        out.fill_(n)
    assert all(out.eq(n).all() for n, out in enumerate(first))
    for bank, out in zip(banks, second, strict=True):
        torch.testing.assert_close(out, bank.mean(0))
    owners = torch.ops.adamix_kernels.merge_banks(banks, scores, backend)
    assert len({out.untyped_storage().data_ptr() for out in owners if out.numel()}) == len(banks) - 1


def lora_layers(randn, dtype=torch.float32, factors=torch.float32, shape=(24, 16)):
    """Three layers that are alike, and one each of other groups, the other way round, of a bank, of another scaling."""
    rows, cols = shape

    def layer(experts=(), groups=1, per_group=rows, offsets=(0,), fan=False, scaling=0.5):
        a = randn(*experts, groups * 4, cols, dtype=factors)
        b = randn(*experts, groups * per_group, 4, dtype=factors)
        weight = randn(*((cols, rows) if fan else (rows, cols)), dtype=dtype)
        return LoraLayer(weight, a, b, scaling, groups, offsets, fan)

    return [
        layer(), layer(), layer(groups=2, per_group=8, offsets=(0, 16)), layer(fan=True), layer(experts=(3,)), layer(),
        layer(scaling=2.0),
    ]  # fmt: skip


def check_lora_lists(backend, randn, around=contextlib.nullcontext):
    """merge_loras gives merge_lora's bits for every layer. Returns what the context around the first list gave."""
    seen = None
    for dtype, factors in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        layers = lora_layers(randn, dtype, factors)
        # One at an odd address, one that is not contiguous.
        odd = torch.cat([layers[1].weight.new_zeros(1), layers[1].weight.flatten()])[1:].view_as(layers[1].weight)
        strided = layers[0].lora_b.t().contiguous().t()
        for some in (layers, [layers[0], layers[1]._replace(weight=odd), layers[5]._replace(lora_b=strided)]):
            with poisoned_memory(backend != "reference"), around() as names:
                got = merge_loras(some, backend=backend)
            seen = names if seen is None else seen
            for out, layer in zip(got, some, strict=True):
                assert torch.equal(out, merge_lora(**layer._asdict(), backend=backend))
                assert out.is_contiguous()
                assert not out.requires_grad
        for n, out in enumerate(got):
            out.fill_(n)
        assert all(out.eq(n).all() for n, out in enumerate(got))
    assert merge_loras([], backend=backend) == []
    return seen


# Of the banks A and B: experts; groups, outputs of each and their offsets; ranks; the scores' dtype.
LORA_BANKS = [
    ((4, 1), 1, 80, (0,), 8, None),
    ((3, 1), 2, 24, (8, 112), 20, torch.float32),
    ((2, 1), 3, 16, (120, 0, 60), 36, torch.bfloat16),
    ((2, 3), 1, 72, (8,), 12, torch.float32),
]


def check_lora_banks(backend, randn, dtype, factors, fan, banks=LORA_BANKS, around=contextlib.nullcontext):
    """merge_lora_banks has the bits of merge_banks and merge_loras. Returns what the context around each call gave."""
    seen = []
    for (ma, mb), groups, per_group, offsets, r, scored in banks:
        layers, scores = [], []
        for _ in range(2):
            a, b = (randn(m, groups * n, k, dtype=factors) for m, n, k in ((ma, r, 136), (mb, per_group, r)))
            weight = randn(136, 136, dtype=dtype)
            layers.append(LoraLayer(weight, a, b, 0.5, groups, offsets, fan))
            scores.append(tuple(None if scored is None else randn(m, dtype=scored) for m in (ma, mb)))
        with poisoned_memory(backend != "reference"), around() as names:
            got, means = merge_lora_banks(layers, scores, backend=backend)
        seen.append(names)
        want = [
            tuple(
                bank[0] if len(bank) == 1 else merge_banks([bank], [score], backend=backend)[0] for bank, score in pair
            )
            for pair in (zip((layer.lora_a, layer.lora_b), s, strict=True) for layer, s in zip(layers, scores))
        ]
        plain = [layer._replace(lora_a=a, lora_b=b) for layer, (a, b) in zip(layers, want, strict=True)]
        for out, mean, weight, wanted in zip(got, means, merge_loras(plain, backend=backend), want, strict=True):
            assert torch.equal(out, weight)
            assert all(torch.equal(one, other) for one, other in zip(mean, wanted, strict=True))
            assert not out.requires_grad
    assert merge_lora_banks([], [], backend=backend) == ([], [])
    with pytest.raises(ValueError, match="scores: got 1 of them, expected those of A and of B for each of the 2"):
        merge_lora_banks(layers, scores[:1], backend=backend)
    with pytest.raises(ValueError, match=r"scores\[1\]\[0\]: got shape"):
        merge_lora_banks(layers, [(None, None), (randn(ma + 1), None)], backend=backend)
    return seen


def check_whole_lora_model(backend, device, around_merge=contextlib.nullcontext):
    """The weights of a model's LoRA layers are merged_weight's, and unmerge brings back every bit."""
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    ak.adapt(model, ak.AdaMixConfig(method="lora", target_modules=["0", "1", "2"], r=4, share=None)).to(device)
    for layer in model:
        layer.backend = backend
        for bank in (layer.lora_a, layer.lora_b):
            torch.nn.init.normal_(bank)
    before = [layer.weight.detach().clone() for layer in model]
    want = [layer.merged_weight().detach().clone() for layer in model]
    with around_merge() as seen:
        ak.merge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, want, strict=True))
    ak.unmerge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True))
    return seen
