"""Folders of tiny adaptations, trained apart as far as a pack can tell, and what each computes alone."""

import copy

import tiny
import torch

from adamix_kernels import AdaMixConfig, adapt, load_adamix, merge, save_adamix, use_experts
from adamix_kernels.models.centroid import Centroid
from adamix_kernels.models.state import adamix_state

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def randomise(model, seed, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def saved(folder, build, seed, *, merged=True, labels=None, centroid=None, **config):
    """A folder of save_adamix. build: of tiny, which takes num_labels where labels are given."""
    model = build() if labels is None else build(num_labels=len(labels))
    if labels is not None:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: n for n, name in enumerate(labels)}
    adapt(model, AdaMixConfig(**{"num_experts": 3, **config}))
    randomise(model, seed)
    if centroid is not None:
        adamix_state(model).centroid = Centroid(centroid, 8, 0.5)
    return save_adamix(merge(model) if merged else model, folder)


def peft_saved(folder, model, seed, **config):
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.eval().save_pretrained(folder)
    return wrapped


def alone(build, folder, batch, labels=None):
    """The logits of one folder of save_adamix by itself, in evaluation."""
    model = load_adamix(build() if labels is None else build(num_labels=labels), folder).eval()
    with torch.no_grad():
        return model(**batch).logits


def inputs(model, batch=6, tokens=7):
    found = {k: v for k, v in tiny.batch_for(model, batch, tokens).items() if k != "labels"}
    found["attention_mask"][1, 5:] = 0
    return found


def logits(model, names, batch, **options):
    with torch.no_grad(), use_experts(model, names, **options):
        return model(**batch).logits


def state_of(model):
    """Everything that a refused call must leave as it was."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        copy.deepcopy(model.config.to_dict()),
        getattr(model, "adamix", None) is None,
        torch.random.get_rng_state().clone(),
    )


def same_state(one, other):
    assert one[0] == other[0]
    assert one[2:5] == other[2:5]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[5:], other[5:], strict=True))
