"""A tiny adapted classifier over a folder of its own, and what it computes: for the tests of saving and loading."""

import torch

from adamix_kernels import AdaMixConfig, adapt
from adamix_kernels.tasks import load_classifier, resolve_model

TEXTS = ["good film", "a very poor story"]


def randomise(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def adapted(encoder, method="adapter", pooling="auto", **options):
    model, tokenizer = load_classifier(resolve_model(str(encoder)), ["bad", "good"], pooling)
    return randomise(adapt(model, AdaMixConfig(method=method, **options))).eval(), tokenizer


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
