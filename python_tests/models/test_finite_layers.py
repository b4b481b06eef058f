"""ADAMIX_CHECK=1: a layer that is not finite is named with its expert and the cause; without it, NaN stays silent."""

import pytest
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2
from tiny_training import adapted, dataset_for, trainer_for

from adamix_kernels import merge, use_experts
from adamix_kernels.models import trainer as trainer_module

NAN, INF = float("nan"), float("inf")
ADAPTER, LORA = "bert.encoder.layer.1.output.dense", "transformer.h.0.attn.c_attn"


@pytest.fixture(autouse=True)
def _checked(monkeypatch):
    monkeypatch.setenv("ADAMIX_CHECK", "1")


def bert(**options):
    return adapted(tiny_bert(), share=None, **options)


def gpt2(**options):
    return adapted(tiny_gpt2(), method="lora", share=None, **options)


def spoil(model, name, at, value=NAN):
    with torch.no_grad():
        model.get_parameter(name)[at] = value


def inputs(model):
    return {name: value for name, value in batch_for(model).items() if name != "labels"}


CASES = {
    "down": (bert, f"{ADAPTER}.adapter.down_weight", (2, 1, 3), NAN, f"{ADAPTER}: got nan in sample 1, token 0.*"
             r"expert 2 \(down\) and expert 2 \(up\).*: down_weight of expert 2 holds nan"),
    "up": (bert, f"{ADAPTER}.adapter.up_bias", (2, 5), INF, f"{ADAPTER}: got inf in sample 1, token 0, column 5, .*"
           "up_bias of expert 2 holds inf"),
    "a": (gpt2, f"{LORA}.lora_a", (2, 0, 0), NAN, f"{LORA}: got nan in sample 1, .*lora_a of expert 2 holds nan"),
    "b": (gpt2, f"{LORA}.lora_b", (2, 4, 1), NAN, f"{LORA}: got nan in sample 1, .*column 4, .*lora_b of expert 2"),
    "base": (gpt2, f"{LORA}.base.bias", (7,), INF, f"{LORA}: got inf in sample 0, .*column 7, .*base layer's output"),
    "before": (bert, "bert.embeddings.word_embeddings.weight", slice(None), NAN,
               r"bert.encoder.layer.0.output.dense: .*expert 0 \(down\).*its input has nan there already"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_and_the_expert_are_named(case, training, monkeypatch):
    make, name, at, value, message = CASES[case]
    model = make().train(training)
    spoil(model, name, at, value)
    with use_experts(model, [0, 2, 1, 2]):
        with pytest.raises(FloatingPointError, match=message):
            model(**inputs(model))
        monkeypatch.delenv("ADAMIX_CHECK")
        model(**inputs(model))  # GPT-2's attention even hides it: logits of NaN queries are finite


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_the_drawn_expert_is_named(make, routing):
    """Every expert but 1 is whole: it alone is named, by whoever drew it, and nobody else stops."""
    model = make(routing=routing).train()
    name = f"{ADAPTER}.adapter.down_weight" if make is bert else f"{LORA}.lora_a"
    spoil(model, name, (1, 0, 0))
    said = []
    for _ in range(40):
        try:
            model(**inputs(model))
        except FloatingPointError as error:
            said.append(str(error))
    assert all(f"{name.rpartition('.')[2]} of expert 1 holds nan" in message for message in said)
    assert len(said) == 40 if routing == "token" else len(said) > 10


def test_merged_experts_and_merged_models():
    model = bert().eval()
    spoil(model, f"{ADAPTER}.adapter.up_weight", (1, 0, 0))
    with pytest.raises(FloatingPointError, match=f"{ADAPTER}.*the merged experts.*up_weight of expert 1 holds nan"):
        model(**inputs(model))
    with pytest.raises(FloatingPointError, match=f"{ADAPTER}.*up_weight of expert 0 holds nan"):
        merge(model)(**inputs(model))


def test_an_overflow_is_no_experts_nan():
    model = gpt2().eval()
    with torch.no_grad():
        for bank in (f"{LORA}.lora_a", f"{LORA}.lora_b"):
            model.get_parameter(bank).fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"input and experts are finite, so torch.float32 cannot hold"):
        model(**inputs(model))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_looking_changes_no_bit(make, monkeypatch):
    def step():
        model = make(dropout=0.2).train()
        torch.manual_seed(3)
        model(**inputs(model)).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    looked = step()
    monkeypatch.delenv("ADAMIX_CHECK")
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(looked, step(), strict=True))


def test_a_compiled_model_is_one_graph():
    model = bert().eval()
    want = model(**inputs(model)).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs(model)).logits, want)


def test_training_stops_and_the_weights_stay(tmp_path):
    model = bert()
    trainer = trainer_for(model, tmp_path, dataset_for(model))
    spoil(model, f"{ADAPTER}.adapter.down_weight", (slice(None), 0, 0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match=rf"^{ADAPTER}: got nan .*down_weight of expert \d holds nan"):
        trainer.train()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], equal_nan=True, rtol=0, atol=0)


def test_a_gradient_stops_before_the_step(tmp_path):
    model = bert()
    bank = model.get_parameter(f"{ADAPTER}.adapter.up_weight")
    bank.register_hook(lambda grad: torch.cat([grad[:2], grad[2:] + INF]))
    before = bank.detach().clone()
    with pytest.raises(FloatingPointError, match=r"up_weight: got a gradient with inf for expert 2, expected"):
        trainer_for(model, tmp_path, dataset_for(model)).train()
    assert torch.equal(bank, before)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_loss_behind_the_layers(weight, tmp_path):
    model = bert(consistency_weight=weight)
    spoil(model, "classifier.bias", 0)
    with pytest.raises(FloatingPointError, match=r"^logits: got nan in pass 1" if weight else r"^loss: got loss = nan"):
        trainer_for(model, tmp_path, dataset_for(model)).train()


def test_an_unchecked_training_says_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAMIX_CHECK")
    monkeypatch.setattr(trainer_module, "check_gradients", lambda _model: pytest.fail("looked"))
    model = bert()
    spoil(model, "classifier.bias", 0)
    trainer_for(model, tmp_path, dataset_for(model)).train()
