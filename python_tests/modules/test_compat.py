"""compat: the reference project's constructors, keys and behaviour, against a transcription of the published one."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

from adamix_kernels.compat import AdamixMergedLinear, ExpertSoup, NLGExpertSoup

H, R, M = 12, 4, 3
B, S = 5, 7
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def leaves(module):
    """The official state dict as independent leaves."""
    return {k: v.clone().requires_grad_(v.dim() > 1 or k.endswith("bias")) for k, v in module.state_dict().items()}


def soup(**options):
    return randomise(ExpertSoup(H, R, "gelu", num_expert=M, inference_level=3, **options))


def lora(**options):
    defaults = dict(num_experts=M, in_features=H, out_features=3 * H, r=R, lora_alpha=8)
    defaults.update(enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False)
    return randomise(AdamixMergedLinear(**{**defaults, **options}))


def mean(rows, scores):
    weights = torch.softmax(scores, 0)
    return sum(w * row for w, row in zip(weights, rows))


def experts(state, prefix):
    """The values of prefix.0, prefix.1, ... (suffixes kept apart), in order."""
    return [state[k] for k in sorted(k for k in state if k.startswith(prefix))]


def published_side(state, side, x, choice):
    """choice: an expert id, "merged", or per-row ids of x's leading shape."""
    pre = f"{side}.deepspeed_experts."
    count = sum(k.startswith(pre) and k.endswith("weight") for k in state)
    weights = [state[f"{pre}{m}.weight"] for m in range(count)]
    biases = [state[f"{pre}{m}.bias"] for m in range(count)]
    if choice == "merged":
        scores = state[f"{side}.expert_score_weight"]
        return x @ mean(weights, scores).T + mean(biases, scores)
    return x @ weights[choice].T + biases[choice]


def published_soup(state, x, residual, down, up, act=F.gelu):
    return published_side(state, "MoA_B", act(published_side(state, "MoA_A", x, down)), up) + residual


def published_lora(state, x, a, b, scaling=2.0):
    """q and v of a fused layer with a transposed weight; a, b: expert ids or "merged"."""
    bank_a, bank_b = experts(state, "experts_lora_A."), experts(state, "experts_lora_B.")
    scores = state["lora_expert_score_weight"]
    factor_a = bank_a[a] if a != "merged" else bank_a[0] if len(bank_a) == 1 else mean(bank_a, scores)
    factor_b = bank_b[b] if b != "merged" else bank_b[0] if len(bank_b) == 1 else mean(bank_b, scores)
    base = x @ state["weight"] + state["bias"]
    q = x @ factor_a[:R].T @ factor_b[:H].T
    v = x @ factor_a[R:].T @ factor_b[H:].T
    return base + scaling * torch.cat([q, torch.zeros_like(q), v], -1)


def grads_agree(module, state, ours, theirs):
    """Gradients of both outputs' projections, compared key by key."""
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    mine = {name: bank.grad for name, bank in module.named_parameters() if bank.grad is not None}
    for key, leaf in state.items():
        stem, expert = key, None
        parts = key.split(".")
        number = next((p for p in parts if p.isdigit()), None)
        if number is not None:
            expert, stem = int(number), ".".join(p for p in parts if p != number)
        got = mine.get(stem)
        if got is None:
            assert leaf.grad is None, key
            continue
        got = got if expert is None else got[expert]
        if leaf.grad is None:
            assert torch.count_nonzero(got) == 0, key
        else:
            torch.testing.assert_close(got, leaf.grad, **TIGHT, msg=key)


@pytest.mark.parametrize(("shared", "down", "up"), [({}, M, M), ({"sharing_down": 1}, 1, M), ({"sharing_up": 1}, M, 1)])
def test_soup_keys_are_the_reference_projects(shared, down, up):
    module = soup(**shared)
    want = {}
    for side, count, out, inner in (("MoA_A", down, R, H), ("MoA_B", up, H, R)):
        want[f"{side}.expert_score_weight"] = (count,)
        for m in range(count):
            want[f"{side}.deepspeed_experts.{m}.weight"] = (out, inner)
            want[f"{side}.deepspeed_experts.{m}.bias"] = (out,)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == want
    assert list(module.state_dict()) == list(want)


@pytest.mark.parametrize(("shared", "a", "b"), [({}, M, M), ({"share_A": 1}, 1, M), ({"share_B": 1}, M, 1)])
def test_lora_keys_are_the_reference_projects(shared, a, b):
    shapes = {k: tuple(v.shape) for k, v in lora(**shared).state_dict().items()}
    want = {"weight": (H, 3 * H), "bias": (3 * H,), "lora_expert_score_weight": (M,)}
    want |= {f"experts_lora_A.{m}": (2 * R, H) for m in range(a)}
    want |= {f"experts_lora_B.{m}": (2 * H, R) for m in range(b)}
    assert shapes == want


@pytest.mark.parametrize("shared", [{}, {"sharing_up": 1}])
def test_soup_training_uses_one_expert_per_side(shared):
    module, x, residual = soup(**shared).train(), torch.randn(B, S, H), torch.randn(B, S, H)
    up_count = 1 if shared else M
    drawn = set()
    for _ in range(40):
        out = module(x, residual)
        state = leaves(module)
        hits = [
            pair
            for pair in itertools.product(range(M), range(up_count))
            if torch.allclose(out, published_soup(state, x, residual, *pair), **TIGHT)
        ]
        assert len(hits) == 1
        drawn.add(hits[0])
    assert {down for down, _ in drawn} == set(range(M))
    assert {up for _, up in drawn} == set(range(up_count))
    assert shared or len(drawn) > M
    out = module(x, residual)
    state = leaves(module)
    pair = next(
        p
        for p in itertools.product(range(M), range(up_count))
        if torch.allclose(out, published_soup(state, x, residual, *p), **TIGHT)
    )
    grads_agree(module, state, out, published_soup(state, x, residual, *pair))


@pytest.mark.parametrize("training", [False, True])
def test_soup_merged_and_learned_scores(training):
    module, x = soup().train(training), torch.randn(B, S, H)
    if training:
        module.MoA_A.expert_score_weight.requires_grad = True
        module.MoA_B.expert_score_weight.requires_grad = True
    state = {k: v.requires_grad_(training or v.requires_grad) for k, v in leaves(module).items()}
    ours, theirs = module(x, x), published_soup(state, x, x, "merged", "merged")
    torch.testing.assert_close(ours, theirs, **TIGHT)
    grads_agree(module, state, ours, theirs)


@pytest.mark.parametrize("level", [0, 1])
def test_soup_random_evaluation(level):
    module = randomise(ExpertSoup(H, R, "relu", num_expert=M, inference_level=level)).eval()
    x, state = torch.randn(B, S, H), module.state_dict()
    every = torch.stack(
        [published_soup(state, x, x, *pair, act=F.relu) for pair in itertools.product(range(M), range(M))]
    )
    seen = set()
    for _ in range(6):
        match = (module(x, x) - every).abs().amax(-1) < 1e-9  # [M * M, B, S]
        assert (match.sum(0) == 1).all()
        chosen = match.double().argmax(0)
        if level == 1:
            assert (chosen == chosen[:, :1]).all()
        else:
            assert (chosen != chosen[:, :1]).any()
        seen.update(chosen.flatten().tolist())
    assert len(seen) > M


def test_soup_evaluation_is_never_stale():
    module, x = soup().eval(), torch.randn(B, S, H)
    before = module(x, x)
    randomise(module)
    after = module(x, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, published_soup(module.state_dict(), x, x, "merged", "merged"), **TIGHT)


@pytest.mark.parametrize("level", [2, 4, 5, -1])
def test_soup_refuses_levels_without_a_result(level):
    with pytest.raises(ValueError, match=f"inference_level: got {level}"):
        ExpertSoup(H, R, inference_level=level)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (None, lambda z: z),
        ("gelu", F.gelu),
        ("gelu_new", lambda z: F.gelu(z, approximate="tanh")),
        ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
        ("relu", F.relu),
        ("swish", F.silu),
    ],
)
def test_soup_activations(name, function):
    module = randomise(ExpertSoup(H, R, name, num_expert=M, inference_level=3)).eval()
    x = torch.randn(B, S, H)
    want = published_soup(module.state_dict(), x, x, "merged", "merged", act=function)
    torch.testing.assert_close(module(x, x), want, **TIGHT)


def test_soup_bad_arguments_are_named():
    with pytest.raises(ValueError, match="act: got 'mish'"):
        ExpertSoup(H, R, "mish")
    with pytest.raises(ValueError, match="num_expert: got 0"):
        ExpertSoup(H, R, num_expert=0)
    with pytest.raises(ValueError, match="sharing_up: got 2"):
        ExpertSoup(H, R, sharing_up=2)


def test_nlg_soup_is_tanh_and_merged():
    module = randomise(NLGExpertSoup(H, R, "gelu", M, 0, 1)).eval()
    x = torch.randn(B, S, H)
    want = published_soup(module.state_dict(), x, x, "merged", "merged", act=lambda z: F.gelu(z, approximate="tanh"))
    torch.testing.assert_close(module(x, x), want, **TIGHT)


def test_initialisation_copies_one_draw():
    module = ExpertSoup(H, R, num_expert=M)
    for side, fan_in in ((module.MoA_A, H), (module.MoA_B, R)):
        bank = side.deepspeed_experts
        for values in (bank.weight, bank.bias):
            assert torch.equal(values, values[:1].expand_as(values))
            assert 0 < values.abs().max() <= fan_in**-0.5
        assert not side.expert_score_weight.requires_grad
        assert torch.count_nonzero(side.expert_score_weight) == 0
    layer = AdamixMergedLinear(num_experts=M, in_features=H, out_features=H, r=R, enable_lora=[True])
    assert torch.equal(layer.experts_lora_A, layer.experts_lora_A[:1].expand_as(layer.experts_lora_A))
    assert 0 < layer.experts_lora_A.abs().max() <= H**-0.5
    assert torch.count_nonzero(layer.experts_lora_B) == 0
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["weight", "lora_expert_score_weight"]


@pytest.mark.parametrize("shared", [{}, {"share_B": 1}, {"share_A": 1}])
def test_lora_training_uses_one_expert_per_side(shared):
    module, x = lora(**shared).train(), torch.randn(B, S, H)
    pairs = list(itertools.product(range(len(module.experts_lora_A)), range(len(module.experts_lora_B))))
    drawn = set()
    for _ in range(40):
        out, state = module(x), leaves(module)
        hits = [p for p in pairs if torch.allclose(out, published_lora(state, x, *p), **TIGHT)]
        assert len(hits) == 1
        drawn.add(hits[0])
    assert len(drawn) >= M
    module.zero_grad()
    out, state = module(x), leaves(module)
    state["weight"].requires_grad_(False)
    pair = next(p for p in pairs if torch.allclose(out, published_lora(state, x, *p), **TIGHT))
    grads_agree(module, state, out, published_lora(state, x, *pair))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [{}, {"share_B": 1}])
def test_lora_merged_and_learned_scores(training, shared):
    module, x = lora(**shared).train(training), torch.randn(B, S, H)
    module.lora_expert_score_weight.requires_grad = training
    state = leaves(module)
    state["lora_expert_score_weight"].requires_grad_(training)
    state["weight"].requires_grad_(False)
    ours, theirs = module(x), published_lora(state, x, "merged", "merged")
    torch.testing.assert_close(ours, theirs, **TIGHT)
    grads_agree(module, state, ours, theirs)


def test_lora_evaluation_is_never_stale_and_merge_weights_is_harmless():
    module, x = lora(merge_weights=True), torch.randn(B, S, H)
    frozen = module.weight.clone()
    for _ in range(2):
        module.train()(x)
        module.eval()
        torch.testing.assert_close(module(x), published_lora(module.state_dict(), x, "merged", "merged"), **TIGHT)
        with torch.no_grad():
            module.experts_lora_A.add_(torch.randn_like(module.experts_lora_A))
    assert torch.equal(module.weight, frozen)


def test_lora_dropout_acts_in_training_only():
    module, x = lora(num_experts=1, lora_dropout=0.5), torch.randn(B, S, H)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("flags", [[True], [True, False], [False, True, False], [True, True, True]])
def test_lora_blocks(flags):
    """Rows of B are the enabled blocks in order; the others stay the base's."""
    out_features = 12
    module = lora(
        out_features=out_features, enable_lora=flags, fan_in_fan_out=False, num_experts=1, lora_alpha=R
    ).eval()
    x, block = torch.randn(B, S, H), out_features // len(flags)
    want = F.linear(x, module.weight, module.bias)
    for g, at in enumerate([i for i, flag in enumerate(flags) if flag]):
        a, b = module.experts_lora_A[0, g * R : (g + 1) * R], module.experts_lora_B[0, g * block : (g + 1) * block]
        want[..., at * block : (at + 1) * block] += x @ a.T @ b.T
    torch.testing.assert_close(module(x), want, **TIGHT)


def test_lora_bad_arguments_are_named():
    for options, message in (
        ({"r": 0}, "r: got 0"),
        ({"enable_lora": [False]}, "enable_lora"),
        ({"enable_lora": [True] * 5}, "enable_lora: got 5 flags"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"num_experts": 0}, "num_experts: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamixMergedLinear(**{"in_features": H, "out_features": 3 * H, "r": R, "enable_lora": [True], **options})


@pytest.mark.parametrize("make", [soup, lora])
def test_strict_loading_round_trip(make):
    source, target = make(), make()
    result = target.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, dict(target.named_parameters())[name])


@pytest.mark.parametrize(("make", "key"), [(soup, "MoA_A.deepspeed_experts.1.bias"), (lora, "experts_lora_A.2")])
def test_loading_reports_the_reference_projects_names(make, key):
    module, state = make(), make().state_dict()
    parent = torch.nn.ModuleDict({"layer": module})
    full = {f"layer.{k}": v for k, v in state.items()}
    absent = {k: v for k, v in full.items() if k != f"layer.{key}"}
    assert parent.load_state_dict(absent, strict=False).missing_keys == [f"layer.{key}"]
    with pytest.raises(RuntimeError, match=f"Missing key.*layer.{key}"):
        parent.load_state_dict(absent)
    more = key.replace("1", "7").replace("2", "7")
    with pytest.raises(RuntimeError, match=f"Unexpected key.*layer.{more}"):
        parent.load_state_dict({**full, f"layer.{more}": full[f"layer.{key}"]})
    with pytest.raises(RuntimeError, match=f"size mismatch for layer.{key}"):
        parent.load_state_dict({**full, f"layer.{key}": torch.zeros(2)})


def test_partial_loading_changes_only_what_came():
    module = soup()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    key = "MoA_A.deepspeed_experts.1.weight"
    module.load_state_dict({key: torch.ones(R, H)}, strict=False)
    for k, v in module.state_dict().items():
        assert torch.equal(v, torch.ones(R, H) if k == key else before[k]), k


def test_spurious_merged_factors_are_ignored():
    module = lora(share_B=1)
    state = {**module.state_dict(), "lora_B_w": torch.zeros(2 * H, R), "lora_A_w": torch.zeros(1)}
    module.load_state_dict(state, strict=True)


@pytest.mark.parametrize("make", [soup, lora])
def test_copies_keep_their_own_keys(make):
    module = make()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        randomise(twin)
        other = make()
        other.load_state_dict(twin.state_dict())
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in twin.state_dict().items())
        assert list(twin.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("make", [soup, lora])
def test_compiles_without_a_graph_break_in_training(make):
    module, x = make().train(), torch.randn(2, 3, H)
    forward = (lambda x: module(x, x)) if make is soup else module
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if p.requires_grad)
