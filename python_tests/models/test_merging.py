"""merge(keep=False): what only unmerge needs is gone, memory too, and everything else still works."""

import gc
import weakref

import pytest
import tiny
import torch
from checkpoint_cases import CASES, adapted, bare, same_bits

from adamix_kernels.models.checkpoint import load_adamix, save_adamix
from adamix_kernels.models.contexts import disable
from adamix_kernels.models.merging import learn_merging, merge, unmerge


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_without_its_experts(case, tmp_path):
    kept, model = merge(adapted(case)), adapted(case)
    layers = [model.get_submodule(path) for path in model.adamix.paths]
    experts = [p for layer in layers for n, p in layer.named_parameters() if not n.startswith("base.")]
    gone = [weakref.ref(p) for p in experts]
    del layers, experts
    assert merge(model, keep=False) is model
    gc.collect()
    assert [bank() for bank in gone] == [None] * len(gone)
    same_bits(kept, model)
    assert not model.adamix.stash
    with pytest.raises(ValueError, match=r"without experts for .*merge\(model, keep=False\) dropped them.*unmerge can"):
        unmerge(model)
    save_adamix(model, tmp_path)
    same_bits(model, load_adamix(bare(case), tmp_path))


def held(model):
    """Bytes of every tensor that the model and what hangs on it hold."""
    seen, total = set(), 0
    kinds = [*model.state_dict(keep_vars=True).values()]
    for kept in model.adamix.stash.values():
        layer, weight = kept if isinstance(kept, tuple) else (kept, None)
        kinds += [*layer.parameters(), *([] if weight is None else [weight])]
    for factors in model.adamix.factors.values():
        kinds += factors.merged_factors()
    for tensor in kinds:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def test_the_memory_of_experts_and_base_copies_is_free():
    sizes = {keep: held(merge(adapted("bert_lora"), keep=keep)) for keep in (True, False)}
    banks = 2 * tiny.LAYERS * (3 * 2 * tiny.HIDDEN * 2 + 6) * 4  # A and B of three experts, and their scores
    copies = 2 * tiny.LAYERS * tiny.HIDDEN**2 * 4
    assert sizes[True] - sizes[False] == banks + copies


def test_disable_needs_what_was_dropped_only_where_the_weights_changed():
    lora, adapter = merge(adapted("bert_lora"), keep=False), merge(adapted("bert_adapter"), keep=False)
    with pytest.raises(ValueError, match=r"dropped them.*disable can undo"), disable(lora):
        pass
    assert lora.adamix.merged
    batch = tiny.batch_for(adapter)
    other = bare("bert_adapter")
    other.classifier.load_state_dict(adapter.classifier.state_dict())
    with disable(adapter):
        assert torch.equal(adapter(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("case", ["bert_adapter", "bert_lora"])
def test_what_is_frozen_stays_frozen(case):
    """One trained bank among frozen ones, and none where the merge scores were learned."""
    model = adapted(case).requires_grad_(False)
    layer = model.get_submodule(model.adamix.paths[0])
    if case == "bert_adapter":
        layer.adapter.up_bias.requires_grad_(True)
    want = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in merge(model).named_parameters() if p.requires_grad] == want
    learned = merge(learn_merging(adapted(case)))
    assert not any(p.requires_grad for name, p in learned.named_parameters() if "classifier" not in name)


def test_keep_is_a_bool():
    model = adapted()
    with pytest.raises(TypeError, match="keep: got 'no', expected True or False"):
        merge(model, keep="no")
    assert not model.adamix.merged


def test_unmerge_forgets_the_factors_too():
    model = adapted("bert_lora")
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    assert merge(model).adamix.factors
    assert not unmerge(model).adamix.factors
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
