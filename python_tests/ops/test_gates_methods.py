"""Published mixtures of adapters, each from its formula, against one call with gates: float64, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from adamix_kernels.functional import routed_adapter, routed_lora

BATCH, TOKENS, WIDE, OUT, RANK, EXPERTS = 3, 5, 6, 8, 2, 4


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def parts():
    """x, the frozen layer's output, A, B and a router's weight."""
    x, weight = draw(BATCH, TOKENS, WIDE, seed=0), draw(OUT, WIDE, seed=1).detach()
    a, b = draw(EXPERTS, RANK, WIDE, seed=2), draw(EXPERTS, OUT, RANK, seed=3)
    return x, weight, a, b, draw(EXPERTS, WIDE, seed=4)


def agree(published, ours, leaves):
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=1e-12)
    incoming = torch.cos(torch.arange(published.numel(), dtype=torch.float64)).view_as(published)
    wanted = torch.autograd.grad(published, leaves, incoming, retain_graph=True)
    for got, want in zip(torch.autograd.grad(ours, leaves, incoming), wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_hydra_lora(parts):
    """One A, a head of B's weighed by every token: y = W x + s sum_i softmax(Wr x)_i B_i A x."""
    x, weight, a, b, router = parts
    a = a[:1]
    published = F.linear(x, weight)
    route = F.softmax(F.linear(x, router), -1)
    for i in range(EXPERTS):
        published = published + 2.0 * route[..., i : i + 1] * F.linear(F.linear(x, a[0]), b[i])
    gates = F.linear(x, router).softmax(-1)
    ours = routed_lora(x, a, b, None, None, base=F.linear(x, weight), gates=gates, scaling=2.0)
    agree(published, ours, (x, a, b, router))


def test_lora_moe(parts):
    """Every token weighs all experts: y = W x + sum_i softmax(Wg x)_i (alpha / r) B_i A_i x."""
    x, weight, a, b, router = parts
    route = torch.exp(x @ router.T) / torch.exp(x @ router.T).sum(-1, keepdim=True)
    experts = torch.stack([x @ a[i].T @ b[i].T * (16 / RANK) for i in range(EXPERTS)], 2)
    published = x @ weight.T + torch.einsum("bse,bseo->bso", route, experts)
    gates = F.linear(x, router).softmax(-1)
    ours = routed_lora(x, a, b, None, None, base=F.linear(x, weight), gates=gates, scaling=16 / RANK)
    agree(published, ours, (x, a, b, router))


def test_mola_top_2(parts):
    """Each token's two likeliest experts, weighed by their share of the two."""
    x, weight, a, b, router = parts
    rows = []
    for token in x.flatten(0, 1):
        p = F.softmax(router @ token, 0)
        first, second = sorted(range(EXPERTS), key=lambda i: -p[i].item())[:2]
        total = p[first] + p[second]
        rows.append(weight @ token + sum(p[i] / total * 0.5 * (b[i] @ (a[i] @ token)) for i in (first, second)))
    share, index = F.linear(x, router).softmax(-1).topk(2)
    gates = share / share.sum(-1, keepdim=True)
    ours = routed_lora(x, a, b, index, index, base=F.linear(x, weight), gates=gates, scaling=0.5)
    agree(torch.stack(rows).view(BATCH, TOKENS, OUT), ours, (x, a, b, router))


def test_smear():
    """Adapters averaged before they are applied, with softmax(Wr mean over the sentence's tokens) as weights."""
    x, router = draw(BATCH, TOKENS, WIDE, seed=0), draw(EXPERTS, WIDE, seed=1)
    down, down_bias = draw(EXPERTS, RANK, WIDE, seed=2), draw(EXPERTS, RANK, seed=3)
    up, up_bias = draw(EXPERTS, WIDE, RANK, seed=4), draw(EXPERTS, WIDE, seed=5)
    rows = []
    for sentence in x:
        p = F.softmax(router @ sentence.mean(0), 0)
        wd, bd, wu, bu = (torch.tensordot(p, bank, 1) for bank in (down, down_bias, up, up_bias))
        rows.append(sentence + F.linear(F.gelu(F.linear(sentence, wd, bd)), wu, bu))
    gates = F.linear(x.mean(1), router).softmax(-1)
    ours = routed_adapter(x, down, down_bias, up, up_bias, None, None, residual=x, gates=gates, mix="weights")
    agree(torch.stack(rows), ours, (x, down, down_bias, up, up_bias, router))


def test_polytropon(parts):
    """Task t's row of Z, through a sigmoid and divided by its sum, averages the skills' A and B."""
    x, weight, a, b, _ = parts
    table, task = draw(5, EXPERTS, seed=6), torch.tensor([4, 0, 4])
    rows = []
    for sentence, t in zip(x, task.tolist(), strict=True):
        skill = torch.sigmoid(table[t])
        skill = skill / skill.sum()
        mean_a = sum(skill[i] * a[i] for i in range(EXPERTS))
        mean_b = sum(skill[i] * b[i] for i in range(EXPERTS))
        rows.append(sentence @ weight.T + (sentence @ mean_a.T @ mean_b.T) / RANK)
    gates = table[task].sigmoid()
    gates = gates / gates.sum(-1, keepdim=True)
    ours = routed_lora(
        x, a, b, None, None, base=F.linear(x, weight), gates=gates, mix="weights", scaling=1 / RANK
    )  # fmt: skip
    agree(torch.stack(rows), ours, (x, a, b, table))


def heads_as_experts(a, b):
    """MHR's factors [splits, skills, r, WIDE / splits] and [splits, skills, OUT / splits, r], each a head of its own
    share of the features, as banks of splits * skills experts that are zero elsewhere."""
    splits, wide, out = a.shape[0], a.shape[3], b.shape[2]
    first = [F.pad(a[q], (q * wide, (splits - 1 - q) * wide)) for q in range(splits)]
    second = [F.pad(b[q], (0, 0, q * out, (splits - 1 - q) * out)) for q in range(splits)]
    return torch.cat(first), torch.cat(second)


def test_multi_head_routing(parts):
    """MHR: Polytropon with a row of Z for each of two heads, which own the halves of A's inputs and of B's outputs."""
    x, weight, *_ = parts
    a, b = draw(2, EXPERTS, RANK, WIDE // 2, seed=7), draw(2, EXPERTS, OUT // 2, RANK, seed=8)
    table, task = draw(5, 2, EXPERTS, seed=9), torch.tensor([1, 3, 1])
    rows = []
    for sentence, t in zip(x, task.tolist(), strict=True):
        skill = torch.sigmoid(table[t])
        skill = skill / skill.sum(-1, keepdim=True)
        mean_a = torch.cat([sum(skill[q, i] * a[q, i] for i in range(EXPERTS)) for q in range(2)], 1)
        mean_b = torch.cat([sum(skill[q, i] * b[q, i] for i in range(EXPERTS)) for q in range(2)], 0)
        rows.append(sentence @ weight.T + sentence @ mean_a.T @ mean_b.T)
    gates = table[task].sigmoid()
    gates = (gates / gates.sum(-1, keepdim=True)).flatten(1)
    ours = routed_lora(
        x, *heads_as_experts(a, b), None, None, base=F.linear(x, weight), gates=gates, mix="weights"
    )  # fmt: skip
    agree(torch.stack(rows), ours, (x, a, b, table))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_pefts_poly_layer(splits, training):
    pytest.importorskip("peft")
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    config = PolyConfig(r=RANK, n_tasks=3, n_skills=EXPERTS, n_splits=splits, init_weights=False)
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(WIDE, OUT), "default", config).double().train(training)
    x, task = draw(BATCH, TOKENS, WIDE, seed=0), torch.tensor([2, 0, 1])
    a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    router = layer.poly_router["default"]
    with torch.no_grad():
        router.module_logits.normal_(generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)  # in training the router draws
    theirs = layer(x, task_ids=task)
    torch.manual_seed(5)
    gates = router(task_ids=task, input_ids=x).flatten(1)
    banks = heads_as_experts(a.mT, b.mT)
    ours = routed_lora(
        x, *banks, None, None, base=layer.base_layer(x), gates=gates, mix="weights", scaling=1 / RANK
    )  # fmt: skip
    agree(theirs, ours, (x, a, b, router.module_logits))
