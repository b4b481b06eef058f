"""The published algorithm, transcribed here on its own: two sequential passes against one doubled batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import HIDDEN, batch_for, tiny_bert, tiny_gpt2

from adamix_kernels import AdaMixConfig, adamix_loss, adapt, double_batch
from adamix_kernels.routing import Router


@pytest.fixture
def drawn(monkeypatch):
    """Every index that a layer draws, in order: one entry a side with more than one expert."""
    seen = []
    original = Router.draw

    def spy(self, *args, **kwargs):
        index = original(self, *args, **kwargs)
        if index is not None:
            seen.append(index.clone())
        return index

    monkeypatch.setattr(Router, "draw", spy)
    return seen


def symmetric_kl(p_logits, q_logits):
    """1/2 [KL(q || p) + KL(p || q)], targets without gradient, mean over rows."""
    p, q = F.softmax(p_logits, -1), F.softmax(q_logits, -1)
    forward = F.kl_div(F.log_softmax(p_logits, -1), q.detach(), reduction="batchmean")
    backward = F.kl_div(F.log_softmax(q_logits, -1), p.detach(), reduction="batchmean")
    return 0.5 * (forward + backward)


def pick(index, rows, layer_rows):
    """The ids of the samples (or tokens) in `rows`, one per token: [b, S]."""
    chosen = index[rows]
    return chosen.unsqueeze(1).expand(-1, layer_rows) if chosen.dim() == 1 else chosen


def add_adapter_hooks(base, experts, chosen, rows, activation):
    """Puts h + U act(D h + d) + u behind each feed-forward output, expert by expert, token by token."""
    handles = []
    for path, bank in experts.items():
        down_index, up_index = chosen[path]

        def hook(_module, _args, h, bank=bank, down_index=down_index, up_index=up_index):
            out = torch.empty_like(h)
            downs, ups = pick(down_index, rows, h.shape[1]), pick(up_index, rows, h.shape[1])
            for b in range(h.shape[0]):
                for s in range(h.shape[1]):
                    i, j = int(downs[b, s]), int(ups[b, s])
                    z = bank["down_weight"][i] @ h[b, s] + bank["down_bias"][i]
                    out[b, s] = h[b, s] + bank["up_weight"][j] @ activation(z) + bank["up_bias"][j]
            return out

        handles.append(base.get_submodule(path).register_forward_hook(hook))
    return handles


@pytest.mark.parametrize("share", ["up", "down", None])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_doubled_batch_equals_two_sequential_passes_for_bert_adapters(routing, share, drawn):
    base = tiny_bert(num_labels=3).double()
    model = adapt(copy.deepcopy(base), AdaMixConfig(num_experts=3, bottleneck=4, routing=routing, share=share))
    model.train()
    batch = batch_for(model, batch=4, tokens=5)
    labels = batch.pop("labels")
    loss, ce, kl = adamix_loss(model(**double_batch(batch)).logits, labels, weight=1.5)
    loss.backward()

    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    experts = {
        path: {n: getattr(model.get_submodule(path).adapter, n).detach().clone().requires_grad_() for n in names}
        for path in model.adamix.paths
    }
    zero = torch.zeros(8, dtype=torch.long)
    # At batch level a layer draws one id a pass, for half of the doubled batch.
    sides = (index.repeat_interleave(8 // len(index), 0) for index in drawn)
    chosen = {
        path: (zero if share == "down" else next(sides), zero if share == "up" else next(sides)) for path in experts
    }
    base.train().requires_grad_(False)
    base.classifier.requires_grad_(True)
    logits = []
    for rows in (slice(0, 4), slice(4, 8)):
        handles = add_adapter_hooks(base, experts, chosen, rows, F.gelu)
        logits.append(base(**batch).logits)
        for handle in handles:
            handle.remove()
    want_ce = F.cross_entropy(logits[0], labels)
    want_kl = symmetric_kl(*logits)
    want = want_ce + 1.5 * want_kl
    want.backward()

    torch.testing.assert_close((loss, ce, kl), (want.detach(), want_ce.detach(), want_kl.detach()), check_dtype=False)
    assert kl > 0
    for path, bank in experts.items():
        adapter = model.get_submodule(path).adapter
        for name, leaf in bank.items():
            torch.testing.assert_close(getattr(adapter, name).grad, leaf.grad, msg=f"{path}.{name}")
    torch.testing.assert_close(model.classifier.weight.grad, base.classifier.weight.grad)


def test_batch_routing_gives_each_pass_one_expert_and_each_side_its_own_draw(drawn):
    model = adapt(tiny_bert(), AdaMixConfig(num_experts=4, bottleneck=4, share=None)).train()
    batch = batch_for(model, batch=4)
    batch.pop("labels")
    for _ in range(40):
        model(**double_batch(batch))
    assert len(drawn) == 40 * 2 * 2
    passes = torch.stack(drawn)  # [draws, 2]
    first, second = passes[:, 0].view(40, 2, 2), passes[:, 1].view(40, 2, 2)  # [step, layer, side]
    for one, other in (
        (first, second),
        (first[:, 0], first[:, 1]),
        (first[..., 0], first[..., 1]),
    ):
        assert 0.05 < (one == other).float().mean() < 0.55  # independent draws agree a quarter of the time
    assert torch.bincount(passes[:, 0], minlength=4).min() > 20


def test_gpt2_lora_on_the_fused_c_attn_matches_the_published_update(drawn):
    base = tiny_gpt2().double()
    config = AdaMixConfig(method="lora", num_experts=3, r=2, alpha=16, share="up", consistency_weight=100.0)
    model = adapt(copy.deepcopy(base), config).train()
    scaling = 8.0
    paths = model.adamix.paths
    assert paths == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    with torch.no_grad():
        for path in paths:
            layer = model.get_submodule(path)
            assert torch.equal(layer.lora_a[0], layer.lora_a[1])
            assert layer.lora_b.eq(0).all()
            layer.lora_a.normal_()
            layer.lora_b.normal_(std=0.1)
    batch = batch_for(model, batch=2, tokens=6)
    labels = batch.pop("labels")[:, 1:]
    out = adamix_loss(model(**double_batch(batch)).logits[:, :-1], labels, weight=100.0)
    out.loss.backward()

    factors = {
        p: [getattr(model.get_submodule(p), n).detach().clone().requires_grad_() for n in ("lora_a", "lora_b")]
        for p in paths
    }
    base.train().requires_grad_(False)
    logits = []
    for number in (0, 1):
        handles = []
        for path, index in zip(paths, drawn):
            a, b = factors[path][0][int(index[number])], factors[path][1][0]

            def hook(_module, args, qkv, a=a, b=b):
                x = args[0]
                dq = scaling * x @ a[:2].T @ b[:HIDDEN].T
                dv = scaling * x @ a[2:].T @ b[HIDDEN:].T
                return qkv + torch.cat([dq, torch.zeros_like(dq), dv], -1)

            handles.append(base.get_submodule(path).register_forward_hook(hook))
        logits.append(base(**batch).logits[:, :-1])
        for handle in handles:
            handle.remove()
    rows = [t.reshape(-1, t.shape[-1]) for t in logits]
    want = F.cross_entropy(rows[0], labels.reshape(-1)) + 100.0 * symmetric_kl(*rows)
    want.backward()
    torch.testing.assert_close(out.loss.double(), want.detach())
    for path in paths:
        layer = model.get_submodule(path)
        torch.testing.assert_close(layer.lora_a.grad, factors[path][0].grad)
        torch.testing.assert_close(layer.lora_b.grad, factors[path][1].grad)


def test_bert_gets_a_consistency_gradient_through_both_passes():
    model = adapt(tiny_bert(), AdaMixConfig(num_experts=4, bottleneck=4)).train()
    with torch.no_grad():
        for path in model.adamix.paths:
            for bank in model.get_submodule(path).adapter.banks():
                bank.normal_(std=0.3)
    batch = batch_for(model)
    labels = batch.pop("labels")
    unlabelled = torch.full_like(labels, -100)
    out = adamix_loss(model(**double_batch(batch)).logits, unlabelled, mask=torch.ones_like(labels))
    out.loss.backward()
    assert out.cross_entropy == 0
    assert out.consistency > 0
    grads = [model.get_submodule(p).adapter.down_weight.grad for p in model.adamix.paths]
    assert all(g.abs().sum() > 0 for g in grads)


def test_adapter_initialisation():
    model = adapt(tiny_bert(), AdaMixConfig(num_experts=4, bottleneck=16, share=None))
    for path in model.adamix.paths:
        adapter = model.get_submodule(path).adapter
        for weight in (adapter.down_weight, adapter.up_weight):
            assert 0.015 < weight.std() < 0.025
            assert not torch.equal(weight[0], weight[1])
        assert adapter.down_bias.eq(0).all()
        assert adapter.up_bias.eq(0).all()
