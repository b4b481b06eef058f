"""Calls that fuzzing found to fail, once each. What it found of bad input is in reliability/bad_input."""

import pytest
import torch

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss, routed_adapter


def test_hidden_states_of_no_features_have_a_loss_and_empty_gradients():
    hidden = torch.randn(2, 3, 0, requires_grad=True)
    weight, bias = torch.randn(5, 0, requires_grad=True), torch.randn(5, requires_grad=True)
    labels = torch.tensor([[0, 4, 1]])
    out = linear_adamix_loss(hidden, weight, labels, bias=bias)
    grads = torch.autograd.grad(out.loss, (hidden, weight, bias))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(bias.expand(3, 5), labels[0]))
    assert [tuple(g.shape) for g in grads] == [(2, 3, 0), (5, 0), (5,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_classes_of_large_logits_leave_no_rounding_in_the_gradient(dtype):
    """Where p is exactly one class's, d - E_p d is 0 there, however large d is."""
    torch.manual_seed(3)
    a, b = ((torch.randn(40, 4, dtype=torch.float64) * 1e4).to(dtype) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    certain = ((p == 1) | (p == 0)).all(-1) & ((q == 1) | (q == 0)).all(-1)
    assert certain.sum() > 30
    a.requires_grad_(), b.requires_grad_()
    grads = torch.autograd.grad(consistency_loss(a, b, detach_target=False, reduction="sum"), (a, b))
    for grad, other in zip(grads, (p - q, q - p)):
        assert torch.equal(grad[certain], other[certain] / 2)
    labels = p.argmax(-1)
    both = torch.cat([a, b]).detach().requires_grad_()
    (grad,) = torch.autograd.grad(adamix_loss(both, labels, num_items=1, detach_target=False).loss, both)
    assert torch.equal(grad[:40][certain], (p - q)[certain] / 2)


def test_an_index_for_a_bank_of_no_experts_is_refused_by_the_banks_name():
    x = torch.randn(0, 3, 4)
    tokens = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^down_weight: .* at least one expert"):
        routed_adapter(x, torch.randn(0, 2, 4), None, torch.randn(1, 4, 2), None, tokens, None)


@pytest.mark.parametrize("name", ["labels", "down_index"])
def test_a_number_out_of_range_is_both_an_index_error_and_a_wrong_value(name):
    x, banks = torch.randn(2, 3, 4), (torch.randn(2, 2, 4), None, torch.randn(1, 4, 2), None)
    call = {
        "labels": lambda: adamix_loss(x, torch.full((1, 3), 4)),
        "down_index": lambda: routed_adapter(x, *banks, torch.full((2,), 2), None),
    }[name]
    for error in (IndexError, ValueError):
        with pytest.raises(error, match=f"^{name}: got"):
            call()
