"""adamix_kernels.peft.accelerate against PEFT's own loop: the same numbers, gradients, files; and back."""

import copy

import pytest
import tiny
import torch

from adamix_kernels.peft import accelerate, restore

peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
MODELS = {"bert": tiny.tiny_bert, "gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama}
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"]}
NAMES = ["a", "b", "a", "__base__"]


def wrapped(kind="bert", dropout=0.0, heads=False, **more):
    """Adapters a, b, c of other ranks and scalings; c is in fewer layers."""
    task = {"task_type": "SEQ_CLS"} if heads else {}
    common = {"lora_dropout": dropout, **task}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[kind], **common, **more)
    model = peft.get_peft_model(MODELS[kind](), config, adapter_name="a")
    two = peft.LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=TARGETS[kind], **common)
    model.add_adapter("b", two)
    three = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[kind][:1], layers_to_transform=[1], **common)
    model.add_adapter("c", three)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch_of(model):
    return {k: v for k, v in tiny.batch_for(model.get_base_model()).items() if k != "labels"}


def logits(model, **options):
    with torch.no_grad():
        return model(**batch_of(model), **options).logits


@pytest.mark.parametrize("kind", MODELS)
def test_one_several_and_mixed_adapters_are_as_pefts_own(kind):
    model = wrapped(kind)
    cases = [("a", {}), ("b", {}), (["a", "b", "c"], {}), ("a", {"adapter_names": NAMES})]
    cases += [("a", {"adapter_names": ["c", "b", "c", "b"]}), ("a", {"adapter_names": ["b"] * 4})]
    want = []
    for active, options in cases:
        model.base_model.set_adapter(active)
        want.append(logits(model, **options))
    fast = accelerate(model)
    assert len(fast.layers) == len(
        [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.layer.Linear)]
    )
    for (active, options), expected in zip(cases, want, strict=True):
        model.base_model.set_adapter(active)
        torch.testing.assert_close(logits(model, **options), expected, **CLOSE)
        with model.disable_adapter():
            plain = logits(model)
        assert (plain - expected).abs().max() > 1e-3
    assert fast.restore() is model
    assert all("forward" not in vars(module) for module in model.modules())
    assert "_enable_peft_forward_hooks" not in vars(model.base_model)


def test_heads_and_beams_of_mixed_batches():
    model = wrapped(heads=True)
    want = logits(model, adapter_names=["a", "b", "c", "a"])
    with accelerate(model):
        torch.testing.assert_close(logits(model, adapter_names=["a", "b", "c", "a"]), want, **CLOSE)
    model = wrapped("gpt2")
    options = {**batch_of(model), "max_new_tokens": 4, "num_beams": 3, "do_sample": False, "adapter_names": NAMES}
    with torch.no_grad():
        want = model.generate(**options)
        with accelerate(model):
            assert torch.equal(model.generate(**options), want)


def gradients(model, names, rows=None):
    """Of one adapter a sample, the rows' losses added; PEFT's own loop refuses it in training: one pass a name."""
    batch = tiny.batch_for(model.get_base_model())
    model.zero_grad()
    if rows is None:
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, adapter_names=names).logits
        torch.nn.functional.cross_entropy(out, batch["labels"], reduction="sum").backward()
    else:
        for name in rows:
            mine = [n for n, chosen in enumerate(names) if chosen == name]
            part = {k: v[mine] for k, v in batch.items()}
            labels = part.pop("labels")
            model.set_adapter(name)
            model.set_requires_grad(["a", "b", "c"])
            torch.nn.functional.cross_entropy(model(**part).logits, labels, reduction="sum").backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_mixed_batch_trains_each_adapter_by_its_own_rows():
    names = ["a", "b", "a", "b"]
    model = wrapped(heads=True).train()
    model.set_requires_grad(["a", "b", "c"])
    with pytest.raises(ValueError, match="in training mode"):
        model(**batch_of(model), adapter_names=names)
    fast = accelerate(model)
    got = gradients(model, names)
    assert model.training
    assert model.base_model.training
    fast.restore()
    want = gradients(model, names, ["a", "b"])
    assert got.keys() == want.keys()
    moved = 0
    for name, value in want.items():
        if ".c." in name or value is None:
            assert got[name] is None
            continue
        moved += 1
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    assert moved == 2 * (2 * 2 * 2 + 2)  # a and b: A and B of query and value in two layers, and the head
    with pytest.raises(ValueError, match="in training mode"):
        model(**batch_of(model), adapter_names=names)


def test_optimizer_steps_are_seen_and_nothing_stale_serves():
    model = wrapped()
    other = copy.deepcopy(model)
    accelerate(model)
    logits(model, adapter_names=NAMES)
    with torch.no_grad():
        for one in (model, other):
            one.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").lora_B[
                "a"
            ].weight.data.mul_(2)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), logits(other, adapter_names=NAMES), **CLOSE)
    for one in (model, other):
        one.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").scale_layer(0.5)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), logits(other, adapter_names=NAMES), **CLOSE)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.value").lora_A["b"].weight.zero_()
    assert (logits(copied, adapter_names=NAMES) - logits(model, adapter_names=NAMES)).abs().max() > 1e-5
    torch.testing.assert_close(logits(model, adapter_names=NAMES), logits(other, adapter_names=NAMES), **CLOSE)


def test_files_and_merging_stay_pefts(tmp_path):
    model, plain = wrapped(), wrapped()
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS["bert"](), tmp_path / "b").eval()
    plain.set_adapter("b")
    torch.testing.assert_close(logits(again), logits(plain), **CLOSE)
    model.set_adapter("b")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain), **CLOSE)
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, adapter_names=NAMES)
    model.unmerge_adapter()
    want = logits(plain)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch_of(plain)).logits, want, **CLOSE)


def test_dropout_of_one_adapter_is_pefts_draw_and_of_several_its_rate():
    model = wrapped(dropout=0.4).train()
    batch = batch_of(model)

    def drawn(**options):
        torch.manual_seed(0)
        return model(**batch, **options).logits

    want = drawn()
    model.base_model.set_adapter(["a", "b"])
    both = drawn()
    with accelerate(model):
        torch.testing.assert_close(drawn(), both, **CLOSE)  # left to PEFT
        model.base_model.set_adapter("a")
        torch.testing.assert_close(drawn(), want, **CLOSE)
        one, two = drawn(adapter_names=NAMES), drawn(adapter_names=NAMES)
        assert torch.equal(one, two)
        torch.manual_seed(1)
        assert not torch.equal(model(**batch, adapter_names=NAMES).logits[:3], one[:3])
        layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        layer.lora_dropout["b"].p = 0.0  # two rates in one batch
        x = torch.ones(4, 500, tiny.HIDDEN)
        dropped = layer.forward._dropped(x, layer.forward._used(NAMES), NAMES)
        assert torch.equal(dropped[1], x[1])
        assert torch.equal(dropped[3], x[3])
        share = (dropped[[0, 2]] == 0).float().mean().item()
        assert share == pytest.approx(0.4, abs=0.02)
        assert dropped[[0, 2]].max().item() == pytest.approx(1 / 0.6)


def test_what_peft_computes_otherwise_stays_with_it():
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["query"])
    model = peft.get_peft_model(tiny.tiny_bert(), config, adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_bias=True, target_modules=["value"], init_lora_weights=False))
    for active in ("a", "b"):
        model.base_model.set_adapter(active)
        want = logits(model.eval())
        with accelerate(model):
            assert torch.equal(logits(model), want)
    config = peft.LoraConfig(r=2, target_modules=["query", "word_embeddings"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.tiny_bert(), config).eval()
    want = logits(model)
    with accelerate(model) as fast:
        assert list(fast.left.values()) == ["Embedding"]
        torch.testing.assert_close(logits(model), want, **CLOSE)


def test_half_precision_under_float32_adapters():
    model = wrapped()
    model.get_base_model().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    x = torch.randn(4, 6, tiny.HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        want = layer(x, adapter_names=NAMES)
        single = layer(x)
        with accelerate(model):
            got = layer(x, adapter_names=NAMES)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(layer(x), single, rtol=1e-2, atol=1e-2)


def test_wrong_models_and_names():
    with pytest.raises(TypeError, match="model: got BertForSequenceClassification, expected a PeftModel"):
        accelerate(tiny.tiny_bert())
    other = peft.get_peft_model(tiny.tiny_bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="model: got a PeftModel of IA3Model, expected one of LoRA"):
        accelerate(other)
    model = wrapped()
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        accelerate(model, backend="fast")
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): x"):
        logits(model, adapter_names=["a", "x", "a", "a"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, adapter_names=["a", "b"])
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="adapter_names: got a training forward under activation checkpointing"):
        model(**batch_of(model), adapter_names=NAMES)
    assert restore(model) is model
    accelerate(model).restore()
