"""Routed experts on quantised bases: PyTorch's dynamic int8, and bitsandbytes where it is installed."""

import copy
import importlib.util
import pickle
import warnings
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
import transformers
from torch import nn

from adamix_kernels import (
    AdaMixConfig,
    AdaMixTrainer,
    adamix_loss,
    adapt,
    disable,
    double_batch,
    export_peft,
    load_adamix,
    merge,
    save_adamix,
    summary,
    unmerge,
    use_experts,
)
from adamix_kernels.models.quantised import dynamic_linear, let_gradients_through, plain_weight
from adamix_kernels.models.summary import count_parameters

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not BNB, reason="bitsandbytes is not installed (pip install bitsandbytes)")
LORA = dict(method="lora", num_experts=3, r=4, alpha=8.0)


def quantise(model, part="bert"):
    """Every linear layer of `part` in int8, its activations quantised as they come."""
    parent, _, name = part.rpartition(".")
    box = nn.ModuleDict({"part": model.get_submodule(part)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(box, {nn.Linear}, inplace=True)
    setattr(model.get_submodule(parent), name, box["part"])
    return model


def randomise(model, spread=0.2):
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter) * spread)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def train(model, steps=25):
    batch = tiny.batch_for(model, batch=8)
    labels = batch.pop("labels")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = adamix_loss(model(**double_batch(batch)).logits, labels)
        loss.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.cross_entropy.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize(("method", "targets"), [("lora", None), ("lora", "all-linear"), ("adapter", None)])
def test_a_dynamic_int8_base_trains_and_merges(method, targets, tmp_path):
    config = AdaMixConfig(**{**LORA, "method": method, "target_modules": targets})
    torch.manual_seed(0)
    model = adapt(quantise(tiny.tiny_bert()), config)
    assert all(dynamic_linear(model.get_submodule(path).base) for path in model.adamix.paths)
    base = quantise(tiny.tiny_bert())
    batch = tiny.batch_for(model)
    if method == "lora":
        assert torch.equal(logits(model, batch), logits(base, batch))  # B starts at zero
    torch.manual_seed(5)
    losses = train(model)
    assert losses[-1] < 0.75 * losses[0]
    torch.manual_seed(0)
    floating = adapt(tiny.tiny_bert(), config)
    torch.manual_seed(5)
    assert abs(train(floating)[-1] - losses[-1]) < 0.05

    before = logits(model, batch)
    merge(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    for path in model.adamix.paths:
        layer = model.get_submodule(path)
        assert dynamic_linear(layer.base)
        assert (layer if method == "lora" else layer.adapter).num_experts == 1
    save_adamix(model, tmp_path)
    loaded = load_adamix(quantise(tiny.tiny_bert()), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    base.classifier.load_state_dict(model.classifier.state_dict())
    for merged in (model, loaded):
        with disable(merged):
            assert torch.equal(logits(merged, batch), logits(base, batch))
    unmerge(model)
    assert torch.equal(logits(model, batch), before)


def test_gradients_pass_the_int8_layers():
    """As those of a float model with the dequantised weights; without the pass-through most never arrive."""
    model = randomise(adapt(quantise(tiny.tiny_bert()), AdaMixConfig(**LORA)))
    twin = tiny.tiny_bert()
    with torch.no_grad():
        for path, layer in quantise(tiny.tiny_bert()).named_modules():
            if dynamic_linear(layer):
                twin.get_submodule(path).weight.copy_(layer.weight().dequantize())
    adapt(twin, AdaMixConfig(**LORA))
    mine, other = (
        {n: p for n, p in m.named_parameters() if p.requires_grad or n.endswith("_score")} for m in (model, twin)
    )
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(mine[name])
    batch = tiny.batch_for(model)
    for one in (model, twin):
        with use_experts(one.train(), [0, 1, 2, 0]), warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch warns where a gradient is lost
            one(**batch).loss.backward()
    for name, parameter in mine.items():
        if parameter.requires_grad:
            difference = (parameter.grad - other[name].grad).norm() / other[name].grad.norm()
            assert difference < 0.1, f"{name}: {difference}"


def test_what_follows_an_int8_layer_may_write_into_its_output():
    layer = quantise(nn.Sequential(nn.Linear(6, 5)), "0")
    let_gradients_through(layer)
    let_gradients_through(layer)  # a second adapt() on the same base
    assert len(layer[0]._forward_hooks) == 1
    x = torch.randn(3, 6, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, layer(x.detach()))
    out.mul_(2.0).sum().backward()
    want = 2.0 * layer[0].weight().dequantize().sum(0).expand(3, 6)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_under_activation_checkpointing(reentrant):
    grads = []
    for checkpointed in (False, True):
        model = randomise(adapt(quantise(tiny.tiny_bert()), AdaMixConfig(**LORA))).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        model(**double_batch(tiny.batch_for(model))).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_copies_and_pickles_keep_the_gradient():
    model = randomise(adapt(quantise(tiny.tiny_bert()), AdaMixConfig(**LORA)))
    batch = tiny.batch_for(model)
    grads = []
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(1)
        twin.train()(**batch).loss.backward()
        grads.append([p.grad for p in twin.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_one_float_layer_among_int8_merges_into_its_weight():
    model = tiny.tiny_bert()
    first = model.bert.encoder.layer[0]
    quantise(model, "bert.encoder.layer.1.attention.self")
    model = randomise(adapt(model, AdaMixConfig(**LORA)))
    batch = tiny.batch_for(model)
    before = logits(model, batch)
    merge(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    assert type(first.attention.self.query) is nn.Linear
    assert model.bert.encoder.layer[1].attention.self.query.num_experts == 1
    rows = [line.split()[-3:] for line in summary(model).splitlines() if "lora 4" in line]
    assert rows == [["0/0", "0", "0"]] * 2 + [["1/1", "256", "256"]] * 2
    unmerge(model)
    assert torch.equal(logits(model, batch), before)


def test_export_and_counts_on_an_int8_base(tmp_path):
    model = randomise(adapt(quantise(tiny.tiny_bert()), AdaMixConfig(**LORA)))
    plain = adapt(tiny.tiny_bert(), AdaMixConfig(**LORA))
    assert count_parameters(model) == count_parameters(plain)
    folders = [export_peft(model, tmp_path / "unmerged"), export_peft(merge(model), tmp_path / "merged")]
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    export_peft(model, tmp_path / "expert", expert=1)
    assert (tmp_path / "expert" / "adapter_model.safetensors").read_bytes() != files[0]
    save_adamix(model, tmp_path / "checkpoint")
    loaded = load_adamix(quantise(tiny.tiny_bert()), tmp_path / "checkpoint")
    export_peft(loaded, tmp_path / "loaded")
    assert (tmp_path / "loaded" / "adapter_model.safetensors").read_bytes() == files[0]
    with pytest.raises(ValueError, match="without experts"):
        export_peft(loaded, tmp_path / "none", expert=1)
    assert not (tmp_path / "none").exists()
    experts = (export_peft(model, tmp_path / "one", expert=1, head=False) / "adapter_model.safetensors").read_bytes()
    randomise(model)  # the merged LoRA, trained on
    save_adamix(model, tmp_path / "checkpoint")
    loaded = load_adamix(quantise(tiny.tiny_bert()), tmp_path / "checkpoint")
    names = "trained", "loaded_trained"
    files = [(export_peft(m, tmp_path / n) / "adapter_model.safetensors") for n, m in zip(names, (model, loaded))]
    assert files[0].read_bytes() == files[1].read_bytes() != (tmp_path / "merged" / files[0].name).read_bytes()
    assert (export_peft(model, tmp_path / "two", expert=1, head=False) / files[0].name).read_bytes() == experts


def test_a_quantised_head_is_refused_and_nothing_changes():
    model = quantise(tiny.tiny_bert(), "classifier")
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"got 'classifier', a quantised Linear, .*skip_modules=\['classifier'\]"):
        adapt(model, AdaMixConfig(**LORA))
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    adapt(model, AdaMixConfig(**LORA, modules_to_save=[]))
    assert train(model, steps=2)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_trainer_takes_a_base_that_was_loaded_quantised(trainable, tmp_path):
    """transformers marks such a model, and refuses to train it unless it knows of adapters."""
    model = adapt(quantise(tiny.tiny_bert()), AdaMixConfig(**LORA))
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(is_trainable=trainable, is_qat_trainable=False, quantization_config=None)
    batch = tiny.batch_for(model, batch=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_strategy="no"
    )
    if not trainable:
        with pytest.raises(ValueError, match="quantized"):
            AdaMixTrainer(model, arguments, train_dataset=rows)
        return
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    AdaMixTrainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad)))
    assert "_hf_peft_config_loaded" not in vars(model)


def test_what_counts_as_a_plain_weight():
    linear = nn.Linear(4, 4)
    assert plain_weight(linear) is linear.weight
    assert plain_weight(linear.to(torch.bfloat16)) is linear.weight
    assert plain_weight(nn.Identity()) is None
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        linear.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
        assert plain_weight(linear) is None

    class Scaled(torch.Tensor):
        """A tensor that only looks like float32."""

    linear.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Scaled), requires_grad=False)
    assert plain_weight(linear) is None


def bnb_bert(kind):
    """BERT of width 64, one block of bitsandbytes' 4-bit format, with the encoder's linear layers in `kind`."""
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=tiny.VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip
    if kind is None:
        return model
    import bitsandbytes

    for path, layer in list(model.bert.named_modules()):
        if isinstance(layer, nn.Linear):
            new = getattr(bitsandbytes.nn, kind)(layer.in_features, layer.out_features)
            new.load_state_dict(layer.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.bert.get_submodule(parent), name, new)
    model.bert.to("cpu")  # this packs the 4-bit weights
    return model.eval()


@needs_bnb
def test_bitsandbytes_4_bit_trains_merges_and_exports(tmp_path):
    model = adapt(bnb_bert("Linear4bit"), AdaMixConfig(**LORA))
    query = model.get_submodule(model.adamix.paths[0])
    assert query.base.weight.dtype == torch.uint8
    assert count_parameters(model) == count_parameters(adapt(bnb_bert(None), AdaMixConfig(**LORA)))
    losses = train(model)
    assert losses[-1] < 0.75 * losses[0]
    batch = tiny.batch_for(model)
    before = logits(model, batch)
    merge(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    assert model.get_submodule(model.adamix.paths[0]).base is query.base
    export_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(bnb_bert("Linear4bit"), tmp_path).eval()
    torch.testing.assert_close(logits(other, batch), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, batch), before)


@needs_bnb
def test_bitsandbytes_8_bit_serves_and_merges():
    model = randomise(adapt(bnb_bert("Linear8bitLt"), AdaMixConfig(**LORA)))
    batch = tiny.batch_for(model)
    before = logits(model, batch)
    merge(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    assert type(model.get_submodule(model.adamix.paths[0]).base).__name__ == "Linear8bitLt"
    unmerge(model)
    assert torch.equal(logits(model, batch), before)
