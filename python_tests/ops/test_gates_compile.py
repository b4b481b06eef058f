"""Gated calls under torch.compile(fullgraph=True): the same numbers, one graph for every batch size."""

import pytest
import torch
from plain_gates import gated_adapter_case, gated_lora_case, gradients, leaves_of, run

from adamix_kernels.functional import routed_adapter, routed_lora

CASES = {
    "lora, dense": (routed_lora, gated_lora_case, dict(form="dense, token", groups=2, scales=True)),
    "lora, chosen, weights": (routed_lora, gated_lora_case, dict(form="chosen, sample", mix="weights")),
    "lora, one above and below": (routed_lora, gated_lora_case, dict(form="chosen, token", banks=(1, 1))),
    "adapter, chosen": (routed_adapter, gated_adapter_case, dict(form="chosen, token", residual="input")),
    "adapter, dense, weights": (routed_adapter, gated_adapter_case, dict(form="dense, sample", mix="weights")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_every_batch(name):
    function, case, options = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (7, 11, 13):  # of no other axis's size
        args, kwargs = case(**options, batch=batch, tokens=5, seed=batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(*args, **kwargs)
        got = [out.detach(), *gradients(out, leaves_of(args, kwargs))]
        assert all(torch.equal(a, b) for a, b in zip(got, run(function, args, kwargs, "reference"), strict=True))


def test_in_place():
    torch._dynamo.reset()
    args, options = gated_lora_case("dense, token")
    want = routed_lora(*args, **options)
    target = options["base"].detach() * 1
    compiled = torch.compile(routed_lora, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(*args, **{**options, "base": target}, inplace=True)
    assert torch.equal(target, want)
    assert torch.equal(out, want)
