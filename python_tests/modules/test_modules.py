"""RoutedAdapter, RoutedLoRALinear and AdaptedLayer by themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from adamix_kernels import (
    AdaMixConfig,
    AdaptedLayer,
    RoutedAdapter,
    RoutedLoRALinear,
    Router,
    adamix_loss,
    adapt,
    consistency_loss,
    linear_adamix_loss,
    merge_experts,
    merge_lora,
    routed_adapter,
    routed_lora,
)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    for name, parameter in module.named_parameters():
        if name.endswith("_score"):
            nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", None])
def test_adapter_in_evaluation_uses_the_mean_of_each_side(activation):
    adapter = randomised(RoutedAdapter(8, 3, 4, None, activation)).eval()
    x = torch.randn(2, 5, 8)
    act = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu, "silu": F.silu}
    down_weight, down_bias, up_weight, up_bias = (b.mean(0) for b in adapter.banks())
    hidden = F.linear(x, down_weight, down_bias)
    hidden = act[activation](hidden) if activation else hidden
    want = x + F.linear(hidden, up_weight, up_bias)
    torch.testing.assert_close(adapter(x), want)
    torch.testing.assert_close(adapter.merged()(x), want)
    other = torch.randn_like(x)
    torch.testing.assert_close(adapter(x, other), want - x + other)


def test_scores_weigh_each_side_by_itself():
    adapter = randomised(RoutedAdapter(8, 3, 4, "up")).eval()
    with torch.no_grad():
        adapter.down_score.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    weights = adapter.down_score.softmax(0)
    torch.testing.assert_close(adapter.merged().down_weight[0], torch.einsum("m,mrh->rh", weights, adapter.down_weight))
    torch.testing.assert_close(adapter.merged().up_weight, adapter.up_weight)


@pytest.mark.parametrize("shape", [(6, 8), (2, 5, 8), (2, 3, 2, 8), (0, 5, 8)])
@pytest.mark.parametrize("level", ["batch", "sample", "token"])
def test_any_leading_shape(shape, level):
    x = torch.randn(shape)
    router = Router(level)
    assert randomised(RoutedAdapter(8, 3, 4, router=router))(x).shape == shape
    layer = RoutedLoRALinear.from_linear(nn.Linear(8, 6), 2, 4, 3, router=router)
    assert layer(x).shape == (*shape[:-1], 6)
    with pytest.raises(ValueError, match=r"x: got shape \(8,\)"):
        RoutedAdapter(8, 3, 4)(torch.randn(8))


def test_lora_from_linear_and_from_conv1d():
    x = torch.randn(2, 4, 8)
    for base, transposed in ((nn.Linear(8, 6), False), (Conv1D(6, 8), True)):
        layer = RoutedLoRALinear.from_linear(base, 2, 4, 3, share=None, dropout=0.1)
        assert torch.equal(layer.eval()(x), base(x))  # B starts at zero
        assert not any(p.requires_grad for p in base.parameters())
        randomised(layer)
        a, b = layer.merged_factors()
        torch.testing.assert_close(a, layer.lora_a.mean(0))
        torch.testing.assert_close(layer(x), base(x) + 2.0 * x @ a.T @ b.T)
        update = 2.0 * b @ a
        torch.testing.assert_close(layer.merged_weight(), base.weight + (update.T if transposed else update))


def test_lora_on_fused_qkv_leaves_the_untargeted_columns_alone():
    base = nn.Linear(6, 18)
    x = torch.randn(2, 4, 6)
    for targets, columns in ((("q", "v"), (0, 2)), (("v", "q"), (0, 2)), (("k",), (1,)), (("q", "k"), (0, 1))):
        layer = randomised(RoutedLoRALinear.from_linear(base, 2, 2, 3, targets=targets)).eval()
        changed = (layer(x) - base(x)).view(2, 4, 3, 6).abs().amax((0, 1, 3)) > 0
        assert changed.tolist() == [c in columns for c in range(3)]
        merged = (layer.merged_weight() - base.weight).view(3, 6, 6).abs().amax((1, 2)) > 0
        assert merged.tolist() == changed.tolist()


class Quantised(nn.Module):
    """An int8 layer: callable, sizes readable, no floating weight."""

    in_features, out_features = 8, 6

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (6, 8), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * 0.05)


def test_any_callable_base():
    layer = randomised(RoutedLoRALinear.from_linear(Quantised(), 2, 4, 3))
    assert layer.lora_a.dtype == torch.float32
    layer.train()(torch.randn(4, 3, 8)).sum().backward()
    assert layer.lora_a.grad is not None
    with pytest.raises(ValueError, match="base: got Quantised, expected a layer with a floating weight"):
        layer.merged_weight()


def test_training_draws_differ_and_dropout_acts():
    layer = randomised(RoutedLoRALinear.from_linear(nn.Linear(8, 6), 2, 4, 1, share=None, dropout=0.5))
    x = torch.randn(4, 3, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    adapter = randomised(RoutedAdapter(8, 3, 8))
    assert any(not torch.equal(adapter(x), adapter(x)) for _ in range(5))


def test_adapted_layer_shows_its_bases_weight():
    base = nn.Linear(4, 8)
    layer = AdaptedLayer(base, RoutedAdapter(8, 2, 3))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer(torch.randn(2, 3, 4)).shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RoutedAdapter(0, 2, 3), "hidden_size: got 0"),
        (lambda: RoutedAdapter(8, 2.5, 3), "bottleneck: got 2.5"),
        (lambda: RoutedAdapter(8, 2, 3, share="all"), "share: got 'all'"),
        (lambda: RoutedAdapter(8, 2, 3, activation="tanh")(torch.randn(1, 2, 8)), "activation: got 'tanh'"),
        (lambda: RoutedLoRALinear.from_linear(nn.LayerNorm(8), 2, 4, 3), "layer: got LayerNorm"),
        (lambda: RoutedLoRALinear.from_linear(nn.Linear(8, 6), 2, 4, 3, dropout=1.0), "dropout: got 1.0"),
        (lambda: RoutedLoRALinear.from_linear(nn.Linear(8, 6), 2, 4, 3, targets=("x",)), "targets: got"),
        (lambda: RoutedLoRALinear.from_linear(nn.Linear(8, 8), 2, 4, 3, targets=("q",)), "targets: got a layer of 8"),
        (lambda: RoutedLoRALinear.from_linear(nn.Linear(8, 6), 2, 4, 3, groups=2), "output_offsets: got"),
        (
            lambda: RoutedLoRALinear(nn.Linear(8, 6), 8, 6, 2, 4, 3, groups=2, output_offsets=(0, 2)),
            "output_offsets: got .*without overlap",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("training", [True, False], ids=["drawn", "merged"])
@pytest.mark.parametrize("level", ["batch", "sample", "token"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)], ids=lambda s: f"{len(s)}-D")
@pytest.mark.parametrize("kind", ["adapter", "lora", "lora with a hook"])
def test_the_output_takes_in_place_additions(kind, shape, level, training):
    """As that of the nn.Linear that stood there: models such as Falcon add to it in place."""
    torch.manual_seed(0)
    router = Router(level)
    base = torch.nn.Linear(6, 6)
    if kind == "adapter":
        layer = AdaptedLayer(base, RoutedAdapter(6, 2, 3, None, router=router))
    else:
        layer = RoutedLoRALinear.from_linear(base, 2, 4.0, 3, None, router=router)
        torch.nn.init.normal_(layer.lora_b)
        if "hook" in kind:
            base.register_forward_hook(lambda *_: None)
    layer.double().train(training)
    x, more = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for add in (
        lambda out: out + 2 * more,
        lambda out: out.add_(more, alpha=2),
        lambda out: out.mul_(1).add_(2 * more),
    ):
        layer.zero_grad()
        more.grad = None
        torch.manual_seed(1)
        out = add(layer(x.clone().requires_grad_()))
        out.square().sum().backward()
        banks = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([out.detach().clone(), more.grad, *banks])
    assert len(results[0]) == (8 if kind == "adapter" else 4)
    for other in results[1:]:
        for want, found in zip(results[0], other, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_model_on_meta_computes_shapes(method):
    """A device without autocast."""
    import transformers
    from tiny import tiny_bert

    if transformers.__version__.startswith("4."):
        pytest.skip("the BERT of transformers 4 reads the values of its mask")

    with torch.device("meta"):
        model = adapt(tiny_bert(), AdaMixConfig(method=method, dropout=0.1 if method == "lora" else 0.0)).train()
    ids = torch.zeros(4, 8, dtype=torch.long, device="meta")
    out = model(input_ids=ids).logits
    out.sum().backward()
    assert out.device.type == "meta"
    assert out.shape == (4, 2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):  # of another device
        assert model(input_ids=ids).logits.dtype == torch.float32
    assert model.eval()(input_ids=ids).logits.shape == (4, 2)


def _meta(*shape, **options):
    return torch.zeros(*shape, device="meta", **options)


_INDEX = dict(dtype=torch.int64)
_ON_META = {
    "routed_adapter": lambda x: routed_adapter(
        x, _meta(2, 4, 8), _meta(2, 4), _meta(2, 8, 4), _meta(2, 8), _meta(4, **_INDEX), _meta(4, 3, **_INDEX)
    ),
    "routed_lora": lambda x: routed_lora(
        x, _meta(2, 4, 8), _meta(2, 8, 4), _meta(4, **_INDEX), _meta(4, **_INDEX), base=_meta(4, 3, 8), dropout_p=0.5
    ),
    "merge_experts": lambda x: merge_experts(x, _meta(4)),
    "merge_lora": lambda x: merge_lora(x[0].new_empty(8, 8), _meta(4, 8), _meta(8, 4), scaling=1.0) + x.sum(),
    "consistency_loss": lambda x: consistency_loss(x, _meta(4, 3, 8)),
    "adamix_loss": lambda x: adamix_loss(x, _meta(2, 3, **_INDEX)).loss,
    "linear_adamix_loss": lambda x: linear_adamix_loss(x, _meta(16, 8), _meta(2, 3, **_INDEX)).loss,
}


@pytest.mark.parametrize("name", _ON_META)
def test_ops_on_meta_compute_shapes_and_gradients(name):
    x = _meta(4, 3, 8, requires_grad=True)
    out = _ON_META[name](x)
    assert out.device.type == "meta"
    out.sum().backward()
    assert x.grad.shape == x.shape
