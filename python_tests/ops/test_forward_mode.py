"""Tangents (torch.autograd.forward_ad, torch.func.jvp): no op has a formula for them, so none may leave them out."""

import pytest
import torch
from torch.autograd import forward_ad

from adamix_kernels import adamix_loss, consistency_loss, merge_experts, merge_lora, routed_adapter, routed_lora
from adamix_kernels.ops import _direct

M, R, H = 2, 4, 16
IDS = torch.tensor([0, 1])


def numbers(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


A, B = numbers(M, R, H), numbers(M, H, R)
CALLS = {
    "routed_adapter": lambda x: routed_adapter(x, A, numbers(M, R), B, numbers(M, H), IDS, IDS),
    "routed_lora": lambda x: routed_lora(x, A, B, IDS, IDS, scaling=0.5),
    "gated": lambda x: routed_lora(x, A, B, None, None, gates=torch.ones(2, M) / M, scaling=0.5),
    "consistency_loss": lambda x: consistency_loss(x[:1], x[1:]),
    "adamix_loss": lambda x: adamix_loss(x, torch.zeros(1, 8, dtype=torch.long)).loss,
    "merge_experts": merge_experts,
    "merge_lora": lambda x: merge_lora(
        x[0, :, :R].contiguous(), A[0, :, :R].contiguous(), B[0, :8].contiguous(), scaling=1.0
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_refused(name):
    call, x = CALLS[name], numbers(2, 8, H)
    wanted = call(x)
    with pytest.raises(RuntimeError, match=r"(?i)jvp|forward"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert not _direct.may_be_direct()
        # Beside tensors that have some, a call without is as ever.
        torch.testing.assert_close(call(x), wanted, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"(?i)jvp|forward"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
    torch.testing.assert_close(call(x), wanted, rtol=0, atol=0)
