"""Routers of gates against their formulas, written on their own; losses over unpadded tokens; bad input by name."""

import copy
import pickle

import pytest
import torch

from adamix_kernels import routing as ro
from benchmarks.mixtures.counted import Calls

B, S, K, M = 3, 5, 8, 4


def tokens(dtype=torch.float64, seed=0):
    return torch.randn(B, S, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask():
    kept = torch.ones(B, S, dtype=torch.long)
    kept[0, 3:] = kept[2, 1:] = 0
    return kept


def seeded(kind, **options):
    torch.manual_seed(4)
    router = kind(K, M, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def test_linear_is_a_softmax_of_which_the_best_are_kept():
    x = tokens()
    dense = seeded(ro.LinearRouter)
    p = torch.softmax(x @ dense.weight.T, -1)
    gates, index = dense(x)
    assert index is None
    torch.testing.assert_close(gates, p)
    top = seeded(ro.LinearRouter, top_k=2)
    gates, index = top(x)
    for b in range(B):
        for s in range(S):
            best = sorted(range(M), key=lambda e: -p[b, s, e].item())[:2]
            assert index[b, s].tolist() == best
            want = p[b, s, best] / p[b, s, best].sum()
            torch.testing.assert_close(gates[b, s], want)
    assert seeded(ro.LinearRouter, top_k=M)(x).chosen is None
    half = copy.deepcopy(dense).to(torch.bfloat16)(tokens(torch.bfloat16))
    assert half.gates.dtype == torch.float32
    torch.testing.assert_close(half.gates.double(), p, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("top_k", [None, 2])
def test_losses_count_the_tokens_that_are_no_padding(top_k):
    x, kept = tokens(), mask()
    router = seeded(ro.LinearRouter, top_k=top_k, balance=True, z=True).train()
    gates, index = router(x, kept)
    logits = (x @ router.weight.T).detach()
    probabilities = logits.softmax(-1)
    share, mean, squares, count = torch.zeros(M).double(), torch.zeros(M).double(), 0.0, 0
    for b in range(B):
        for s in range(S):
            if kept[b, s]:
                count += 1
                mean += probabilities[b, s]
                share += probabilities[b, s] if index is None else (index[b, s][:, None] == torch.arange(M)).sum(0)
                squares += logits[b, s].logsumexp(0) ** 2
    torch.testing.assert_close(router.last.balance.detach(), M * (share / count * mean / count).sum())
    torch.testing.assert_close(router.last.z.detach(), squares / count)
    dense = ro.dense_gates(ro.Gates(gates, index), M).detach()
    want = dense[kept.bool()].mean(0)
    torch.testing.assert_close(router.mean_gates, want.float())
    torch.testing.assert_close(router.mean_square, dense[kept.bool()].square().sum(-1).mean().float())
    x2 = x.clone()
    x2[0, 3:] = 9.0  # what stands in padding does not matter
    router(x2, kept)
    torch.testing.assert_close(router.last.balance.detach(), M * (share / count * mean / count).sum())
    wrong = router(x, torch.ones(B, S + 1))  # of another forward: all tokens count
    assert wrong.gates.shape == gates.shape
    router.last.balance.backward()
    assert router.weight.grad.abs().sum() > 0


def test_the_balance_is_least_where_all_serve_alike():
    even = torch.full((6, 3), 1 / 3)
    assert ro.balance_loss(even).item() == pytest.approx(1)
    index = torch.tensor([[0, 1], [1, 2], [2, 0]])
    assert ro.balance_loss(even[:3], index).item() == pytest.approx(2)
    assert ro.balance_loss(torch.eye(3)[[0] * 6]).item() == pytest.approx(3)
    two = torch.tensor([[0.5, 0.5, 0.0]] * 6)
    assert ro.balance_loss(two, torch.tensor([[0, 1]] * 6)).item() == pytest.approx(3)


def test_sentence_and_threshold():
    x, kept = tokens(), mask()
    router = seeded(ro.SentenceRouter)
    means = torch.stack([x[b][kept[b].bool()].mean(0) for b in range(B)])
    torch.testing.assert_close(router(x, kept).gates, torch.softmax(means @ router.weight.T, -1))
    torch.testing.assert_close(router(x).gates, torch.softmax(x.mean(1) @ router.weight.T, -1))
    some = seeded(ro.ThresholdRouter)
    p = torch.softmax(x @ some.weight.T, -1)
    tau = torch.sigmoid(x @ some.threshold_weight.T + some.threshold_bias) / M
    kept_experts = torch.clamp(p - tau, min=0)
    gates = some(x).gates
    torch.testing.assert_close(gates, kept_experts / kept_experts.sum(-1, keepdim=True))
    assert (gates == 0).any()
    assert torch.isfinite(seeded(ro.ThresholdRouter, limit=0.999)(100 * x).gates).all()


def test_tasks_draw_in_training_and_repeat_by_pass_or_by_beam():
    torch.manual_seed(0)
    router = ro.TaskRouter(3, M, dtype=torch.float64)
    with torch.no_grad():
        router.logits.normal_()
    tasks = torch.tensor([2, 0, 1])
    x = tokens()
    want = router.logits[tasks].sigmoid()
    torch.testing.assert_close(router.eval()(x, tasks=tasks).gates, want / want.sum(-1, keepdim=True))
    two = router(torch.cat([x, x]), tasks=tasks).gates
    assert torch.equal(two[0], two[1])
    assert not torch.equal(two[0], two[2])
    router.train()
    first, second = router(x, tasks=tasks).gates, router(x, tasks=tasks).gates
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(B).double())
    many = torch.stack([router(x, tasks=tasks).gates for _ in range(300)]).mean(0)
    assert (many - want / want.sum(-1, keepdim=True)).abs().max() < 0.15
    for bad, words in ((None, "got None"), (torch.tensor([0, 1]), r"got shape \(2,\) for a batch of 3")):
        with pytest.raises(ValueError, match=f"tasks: {words}"):
            router(x, tasks=bad)


@pytest.mark.parametrize("groups", [1, 2])
def test_arrow_follows_the_direction_that_the_update_answers_to(groups):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(M, groups * 2, K, generator=generator, dtype=torch.float64)
    b = torch.randn(M, groups * 3, 2, generator=generator, dtype=torch.float64)
    router = ro.ArrowRouter(K, M, top_k=2, temperature=0.5, dtype=torch.float64)
    router.refresh(a, b, output_offsets=range(groups))
    x = tokens()
    scores = []
    for e in range(M):
        rows = [b[e].chunk(groups)[g] @ a[e].chunk(groups)[g] for g in range(groups)]
        v = torch.linalg.svd(torch.cat(rows))[2][0]
        torch.testing.assert_close((router.directions[e] @ v).abs(), torch.tensor(1.0).double())
        scores.append((x @ v).abs())
    best, index = torch.stack(scores, -1).topk(2)
    found = router(x)
    assert torch.equal(found.chosen, index)
    torch.testing.assert_close(found.gates, (best / 0.5).softmax(-1))
    before = router.directions.clone()
    router.refresh(a, b, output_offsets=range(groups))
    assert torch.equal(router.directions, before)
    with torch.no_grad():
        a.mul_(torch.randn_like(a))
    router.refresh(a, b, output_offsets=range(groups))
    assert not torch.equal(router.directions, before)
    shared = ro.leading_directions(a[:1], b, groups)
    assert shared.shape == (M, K)
    assert torch.isfinite(ro.leading_directions(a, torch.zeros_like(b), groups)).all()


def test_running_means_are_those_of_batch_normalisation_and_travel():
    router = seeded(ro.LinearRouter).train()
    seen = [router(tokens(seed=n)).gates.detach().mean((0, 1)).float() for n in range(3)]
    torch.testing.assert_close(router.mean_gates, torch.stack(seen).mean(0))
    router.eval()(tokens(seed=9))
    torch.testing.assert_close(router.mean_gates, torch.stack(seen).mean(0))
    router.batches.fill_(1000)
    router.train()
    new = router(tokens(seed=5)).gates.detach().mean((0, 1)).float()
    torch.testing.assert_close(router.mean_gates, torch.stack(seen).mean(0).lerp(new, 0.01))
    router.balance = True
    router(tokens())
    assert router.last.balance is not None
    assert copy.deepcopy(router).last.balance is None
    assert pickle.loads(pickle.dumps(router)).last.balance is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ro.LinearRouter(K, 1), "num_experts: got 1"),
        (lambda: ro.LinearRouter(K, M, top_k=5), "top_k: got 5"),
        (lambda: ro.LinearRouter(K, M, top_k=0), "top_k: got 0"),
        (lambda: ro.ThresholdRouter(K, M, limit=1.5), "limit: got 1.5"),
        (lambda: ro.ArrowRouter(K, M, temperature=0), "temperature: got 0"),
        (lambda: ro.TaskRouter(0, M), "num_tasks: got 0"),
        (lambda: ro.gate_router("best", K, M), "kind: got 'best'"),
        (lambda: ro.gate_router("task", K, M), "num_tasks: got None"),
        (lambda: ro.gate_router("linear", K, M, num_tasks=2), "num_tasks: got 2"),
        (lambda: ro.gate_router("threshold", K, M, top_k=2), "top_k: got 2"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("kind", ro.ROUTERS)
def test_every_router_is_made_by_its_name(kind):
    options = {"num_tasks": 2} if kind == "task" else {"top_k": 2} if kind in ("linear", "sentence", "arrow") else {}
    router = ro.gate_router(kind, K, M, dtype=torch.float64, **options)
    found = router(tokens(), mask(), torch.zeros(B, dtype=torch.long))
    assert found.gates.shape[-1] == (2 if options.get("top_k") else M)
    assert found.gates.dim() == (3 if router.per_token else 2)
    empty = router(tokens()[:0] if kind != "task" else tokens(), mask()[:0], torch.zeros(B, dtype=torch.long))
    assert torch.isfinite(empty.gates).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_running_means_of_a_model_cast_as_a_whole(dtype):
    router = ro.LinearRouter(K, M, 2, balance=True, z=True).train().to(dtype)
    for _ in range(3):
        router(torch.randn(2, 5, K, dtype=dtype), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))
    assert router.batches.item() == 3
    assert router.mean_gates.sum().item() == pytest.approx(1, abs=0.02)
    assert router.last.weights is None


def test_a_training_forward_makes_few_calls():
    """What counts on a GPU, where each is a launch: of the losses and the running means, not of the router itself."""
    router = ro.LinearRouter(K, M, 2, balance=True, z=True).train()
    with Calls() as made:
        router(torch.randn(2, 5, K), torch.ones(2, 5))
    # Product and top 2 with its softmax, tokens counted, balance, z, means: 54 before these shared what they read.
    assert made.count <= 36
