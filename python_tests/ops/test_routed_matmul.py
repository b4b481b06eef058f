"""Products with one expert a token: the way that reads the routing and the one that must not."""

import pytest
import torch

from adamix_kernels.ops import _routed_matmul
from adamix_kernels.ops._routed_matmul import bias_grad, project, project_back, weight_grad

BATCH, TOKENS, INNER, OUTER = 3, 5, 7, 4


@pytest.fixture(params=["reads the routing", "as on a GPU"], autouse=True)
def way(request, monkeypatch):
    if request.param == "as on a GPU":
        monkeypatch.setattr(_routed_matmul, "reads_routing", lambda _index: False)


def drawn(experts, batch=BATCH, tokens=TOKENS):
    x, g = torch.randn(batch, tokens, INNER).double(), torch.randn(batch, tokens, OUTER).double()
    bank, bias = torch.randn(experts, OUTER, INNER).double(), torch.randn(experts, OUTER).double()
    return x, g, bank, bias, torch.randint(experts, (batch, tokens))


@pytest.mark.parametrize("experts", [2, 5])
def test_every_token_meets_its_own_expert(experts):
    x, g, bank, bias, index = drawn(experts)
    torch.testing.assert_close(
        project(x, bank, bias, index), torch.einsum("bsk,bsrk->bsr", x, bank[index]) + bias[index]
    )
    torch.testing.assert_close(project(x, bank, None, index), torch.einsum("bsk,bsrk->bsr", x, bank[index]))
    torch.testing.assert_close(project_back(g, bank, index), torch.einsum("bsr,bsrk->bsk", g, bank[index]))
    mine = torch.nn.functional.one_hot(index, experts).double()
    torch.testing.assert_close(weight_grad(g, x, experts, index), torch.einsum("bsm,bsr,bsk->mrk", mine, g, x))
    torch.testing.assert_close(bias_grad(g, experts, index), torch.einsum("bsm,bsr->mr", mine, g))


def test_an_expert_without_tokens_gets_exact_zeros():
    x, g, _, _, index = drawn(2)
    assert not weight_grad(g, x, 4, index)[2:].any()
    assert not bias_grad(g, 4, index)[2:].any()


def test_another_experts_numbers_do_not_matter():
    x, g, bank, bias, index = drawn(3)
    before = [t[index != 2] for t in (project(x, bank, bias, index), project_back(g, bank, index))]
    bank[2], bias[2] = float("inf"), float("nan")
    after = [t[index != 2] for t in (project(x, bank, bias, index), project_back(g, bank, index))]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (3, 0), (0, 0)])
def test_no_tokens(batch, tokens):
    x, g, bank, bias, index = drawn(2, batch, tokens)
    assert project(x, bank, bias, index).shape == g.shape
    assert project_back(g, bank, index).shape == x.shape
    assert not weight_grad(g, x, 2, index).any()
    assert not bias_grad(g, 2, index).any()


def test_an_infinite_token_reaches_other_experts_only_in_products_over_all_tokens():
    x, g, _, _, index = drawn(2)
    index[:], index[0, 0], x[0, 0] = 0, 1, float("inf")
    grad = weight_grad(g, x, 2, index)
    assert grad[0].isfinite().all() == _routed_matmul.reads_routing(index)
    assert not grad[1].isfinite().all()
