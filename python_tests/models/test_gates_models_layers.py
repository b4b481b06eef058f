"""Layers with gates against the published formulas, written as the papers' loops, and against PEFT's Poly layer."""

import copy

import pytest
import torch
from torch.nn import functional as F

from adamix_kernels import RoutedAdapter, RoutedLoRALinear, Router, routed_lora
from adamix_kernels.routing import LinearRouter, SentenceRouter, TaskRouter, gate_router, spread_heads

B, S, K, N, R = 2, 5, 6, 7, 3


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(share, experts=4, gate=None, mix="outputs", **options):
    torch.manual_seed(1)
    base = torch.nn.Linear(K, N, dtype=torch.float64)
    more = {"gate": gate, "mix": mix, "router": Router("learned"), "dtype": torch.float64, **options}
    layer = RoutedLoRALinear.from_linear(base, r=R, alpha=6, num_experts=experts, share=share, **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def linear_gate(experts=4, **options):
    return LinearRouter(K, experts, dtype=torch.float64, **options)


def agree(layer, formula, x):
    """The layer's output, and its gradients in x and every trained parameter, against those of formula(x)."""
    x = x.clone().requires_grad_()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad and not n.endswith("_score")}
    weights = tokens(*layer(x).shape, seed=7)
    got = torch.autograd.grad((layer(x) * weights).sum(), [x, *trained.values()])
    want = torch.autograd.grad((formula(x) * weights).sum(), [x, *trained.values()])
    torch.testing.assert_close(layer(x), formula(x), rtol=1e-10, atol=1e-12)
    for name, one, other in zip(["x", *trained], got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)
        assert other.abs().sum() > 0, name


def test_hydra_lora_has_one_a_and_a_softmax_over_its_bs():
    layer = lora("down", gate=linear_gate())

    def hydra(x):
        out = layer.base(x)
        route = F.softmax(x @ layer.gate.weight.T, dim=-1)
        for i in range(4):
            out = out + route[:, :, i : i + 1] * ((x @ layer.lora_a[0].T) @ layer.lora_b[i].T) * (6 / R)
        return out

    agree(layer, hydra, tokens(B, S, K))


@pytest.mark.parametrize("top_k", [None, 2])
def test_lora_moe_and_mola_weigh_whole_loras(top_k):
    """LoRAMoE: softmax over all. MoLA, MixLoRA: the two largest, divided by their sum, each expert its own tokens."""
    layer = lora(None, gate=linear_gate(top_k=top_k))

    def mixture(x):
        flat, out = x.reshape(-1, K), layer.base(x).reshape(-1, N)
        weights = F.softmax(flat @ layer.gate.weight.T, dim=-1)
        if top_k is not None:
            weights, chosen = torch.topk(weights, top_k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
        for e in range(4):
            if top_k is None:
                rows, mine = torch.arange(len(flat)), weights[:, e]
            else:
                rows, slot = torch.where(chosen == e)
                mine = weights[rows, slot]
            delta = F.linear(F.linear(flat[rows], layer.lora_a[e]), layer.lora_b[e]) * (6 / R)
            out = out.index_add(0, rows, delta * mine.unsqueeze(-1))
        return out.view(B, S, N)

    agree(layer, mixture, tokens(B, S, K))


@pytest.mark.parametrize("share", [None, "up", "down"])
@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_adapters_mix_weights_or_outputs_by_sentence(mix, share):
    """SMEAR for the weights: every sample's own adapter, the average of all."""
    torch.manual_seed(2)
    gate = SentenceRouter(K, 4, dtype=torch.float64)
    options = {"router": Router("learned"), "gate": gate, "mix": mix, "dtype": torch.float64}
    layer = RoutedAdapter(K, R, 4, share, "relu", **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    layer.router.attention_mask = kept

    def each(bank, e):
        return bank[min(e, bank.shape[0] - 1)]

    def smear(x):
        out = []
        for b in range(B):
            mean = x[b][kept[b].bool()].mean(0)
            g = F.softmax(layer.gate.weight @ mean, dim=0)
            banks = layer.banks()
            if mix == "weights":
                wd, bd, wu, bu = (sum(g[e] * each(bank, e) for e in range(4)) for bank in banks)
                out.append(x[b] + F.relu(x[b] @ wd.T + bd) @ wu.T + bu)
                continue
            parts = []
            for e in range(4):
                wd, bd, wu, bu = (each(bank, e) for bank in banks)
                parts.append(g[e] * (F.relu(x[b] @ wd.T + bd) @ wu.T + bu))
            out.append(x[b] + sum(parts))
        return torch.stack(out)

    agree(layer, smear, tokens(B, S, K))


@pytest.mark.parametrize("splits", [1, 2])
def test_polytropon_and_its_heads_are_as_pefts_poly(splits):
    peft = pytest.importorskip("peft")
    from peft.tuners.poly.layer import Linear as Poly

    torch.manual_seed(0)
    base = torch.nn.Linear(6, 8, dtype=torch.float64)
    config = peft.PolyConfig(r=R, n_tasks=3, n_skills=4, n_splits=splits, target_modules=["x"], init_weights=False)
    theirs = Poly(copy.deepcopy(base), "default", config).double().eval()
    router = TaskRouter(3, 4, splits, dtype=torch.float64).eval()
    with torch.no_grad():
        theirs.poly_router["default"].module_logits.normal_()
        router.logits.copy_(theirs.poly_router["default"].module_logits)
    a = theirs.poly_lora_A["default"].detach().transpose(2, 3).clone().requires_grad_()
    b = theirs.poly_lora_B["default"].detach().transpose(2, 3).clone().requires_grad_()
    x, ids, weights = tokens(3, S, 6), torch.tensor([2, 0, 2]), tokens(3, S, 8, seed=5)
    want = theirs(x, task_ids=ids)
    gates = router(x, tasks=ids).gates
    got = routed_lora(x, *spread_heads(a, b), None, None, base=base(x), gates=gates, mix="weights", scaling=1 / R)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    torch.testing.assert_close(a.grad, theirs.poly_lora_A["default"].grad.transpose(2, 3))
    torch.testing.assert_close(b.grad, theirs.poly_lora_B["default"].grad.transpose(2, 3))
    torch.testing.assert_close(router.logits.grad, theirs.poly_router["default"].module_logits.grad)
    assert router.logits.grad[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("share", "mix"), [(None, "outputs"), (None, "weights"), ("up", "outputs"), ("down", "outputs")]
)
@pytest.mark.parametrize("kind", ["lora", "qkv", "adapter"])
def test_one_expert_computes_what_constant_gates_do(kind, share, mix):
    """merged(): without the cross terms of averaged factors where the outputs are weighed."""
    gate = linear_gate()
    x = tokens(B, S, K)
    if kind == "adapter":
        layer = RoutedAdapter(K, R, 4, share, gate=gate, mix=mix, router=Router("learned"), dtype=torch.float64)
    else:
        more = {"groups": 2, "output_offsets": (0, 4), "group_features": 3} if kind == "qkv" else {}
        layer = lora(share, gate=gate, mix=mix, **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        gate.weight.zero_()
    layer.train()(x)
    assert gate.mean_gates.tolist() == pytest.approx([0.25] * 4)
    want = layer.eval()(x)
    if kind == "adapter":
        plain = layer.merged()
        assert plain.bottleneck == (R * 4 if mix == "outputs" and share != "down" else R)
        torch.testing.assert_close(plain(x), want, rtol=1e-6, atol=1e-6)  # the means are float32
        return
    weight = layer.merged_weight()
    torch.testing.assert_close(F.linear(x, weight, layer.bias), want, rtol=1e-6, atol=1e-6)  # float32 accumulation
    assert layer.merged_factors()[1].shape[1] == (R * 4 if mix == "outputs" and share is None else R)


def test_experts_by_the_caller_are_pairs_and_serve_unweighted():
    layer = lora(None, gate=linear_gate(top_k=2)).eval()
    x = tokens(B, S, K)
    layer.router.experts = torch.tensor([3, 1])
    got = layer(x)
    for b, e in enumerate((3, 1)):
        torch.testing.assert_close(got[b], layer.base(x[b]) + 2 * x[b] @ layer.lora_a[e].T @ layer.lora_b[e].T)
    layer.router.experts, layer.router.eval_level = None, "sample"
    torch.manual_seed(0)
    drawn = layer(x)
    every = torch.stack([layer.base(x) + 2 * x @ layer.lora_a[e].T @ layer.lora_b[e].T for e in range(4)])
    assert (drawn - every).abs().amax((2, 3)).min(0).values.max() < 1e-12


@pytest.mark.parametrize("kind", ["sentence", "task"])
def test_gates_per_sample_refuse_rows_that_know_no_samples(kind):
    gate = gate_router(kind, K, 4, dtype=torch.float64, num_tasks=3 if kind == "task" else None)
    layer = lora(None, gate=gate)
    with pytest.raises(ValueError, match=r"x: got shape \(5, 6\) at RoutedLoRALinear, expected \[B, S, K\]"):
        layer(tokens(5, K))


def test_bad_gates_are_named():
    with pytest.raises(TypeError, match=r"gate: got a Linear, expected a GateRouter"):
        lora(None, gate=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"gate: got one of 3 experts, expected num_experts=4"):
        lora(None, gate=linear_gate(3))
    with pytest.raises(ValueError, match=r"mix: got 'both'"):
        RoutedAdapter(K, R, 4, mix="both")


def test_what_is_not_finite_names_the_gates(monkeypatch):
    monkeypatch.setenv("ADAMIX_CHECK", "1")
    layer = lora(None, gate=linear_gate())
    with torch.no_grad():
        layer.lora_b[2, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"from the experts by their gates.*lora_b of expert 2 holds inf"):
        layer(tokens(B, S, K))
