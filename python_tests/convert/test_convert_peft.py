"""export_peft: PEFT itself loads the folder and computes the same."""

import json

import peft
import pytest
import tiny
import torch
from huggingface_hub import ModelCard

from adamix_kernels.convert import export_peft
from adamix_kernels.models.checkpoint import load_adamix, save_adamix
from adamix_kernels.models.config import AdaMixConfig
from adamix_kernels.models.contexts import use_experts
from adamix_kernels.models.inject import adapt
from adamix_kernels.models.merging import merge

MODELS = {
    "bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta, "gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama,
    "t5": tiny.tiny_t5,
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# For T5, which does not scale its attention: updates far above the weights would only measure float32's rounding.
MILD = 0.2


def adapted(kind, spread=0.5, **options):
    model = adapt(MODELS[kind](), AdaMixConfig(**{**dict(method="lora", num_experts=3, r=2, alpha=6.0), **options}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter) * spread)
    return model


def logits(model, kind):
    with torch.no_grad():
        return model(**tiny.batch_for(MODELS[kind]())).logits


def loaded(kind, folder):
    return peft.PeftModel.from_pretrained(MODELS[kind](), folder).eval()


@pytest.mark.parametrize("share", ["up", "down", None])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_the_merged_model(kind, share, tmp_path):
    model = adapted(kind, spread=MILD if kind == "t5" else 0.5, share=share)
    want = logits(model, kind)
    assert not torch.allclose(want, logits(MODELS[kind](), kind), atol=1e-2)
    export_peft(model, tmp_path)
    other = loaded(kind, tmp_path)
    torch.testing.assert_close(logits(other, kind), want, **CLOSE)
    torch.testing.assert_close(logits(other.merge_and_unload(safe_merge=True), kind), want, **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_model_exports_the_same_bits(kind, tmp_path):
    model = adapted(kind)
    export_peft(model, tmp_path / "unmerged")
    export_peft(merge(model), tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "unmerged" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_each_expert_is_an_adapter_of_its_own(kind, tmp_path):
    """One PeftModel holds them all, as load_adapter and set_adapter have it; export is the same after merge()."""
    model = adapted(kind, spread=MILD, share="up" if kind == "roberta" else None)
    batch, want = tiny.batch_for(MODELS[kind]()), []
    for expert in range(3):
        with torch.no_grad(), use_experts(model, expert):
            want.append(model(**batch).logits)
    assert export_peft(merge(model) if kind == "bert" else model, tmp_path, expert="each") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {"expert_0", "expert_1", "expert_2"}
    other = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "expert_0", adapter_name="expert_0").eval()
    for expert in (1, 2):
        other.load_adapter(tmp_path / f"expert_{expert}", adapter_name=f"expert_{expert}")
    for expert in (2, 0, 1):
        other.set_adapter(f"expert_{expert}")
        torch.testing.assert_close(logits(other, kind), want[expert], **CLOSE)
    assert not torch.allclose(want[0], want[1], atol=1e-3)
    export_peft(model, tmp_path / "one", expert=2)
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "expert_2" / "adapter_model.safetensors"
    ).read_bytes()


def test_gpt2_folder_is_an_ordinary_lora(tmp_path):
    from safetensors.torch import load_file

    export_peft(adapted("gpt2"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 12, True)
    assert isinstance(config["lora_alpha"], int)
    assert (config["target_modules"], config["task_type"], config["peft_type"]) == (["c_attn"], "CAUSAL_LM", "LORA")
    tensors, hidden = load_file(tmp_path / "adapter_model.safetensors"), tiny.HIDDEN
    assert set(tensors) == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{side}.weight"
        for i in range(tiny.LAYERS)
        for side in "AB"
    }
    lora_b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert lora_b.shape == (3 * hidden, 4)
    for rows, columns in ((slice(0, hidden), slice(2, 4)), (slice(2 * hidden, None), slice(0, 2))):
        assert torch.count_nonzero(lora_b[rows, columns]) == 0
    assert torch.count_nonzero(lora_b[hidden : 2 * hidden]) == 0


def test_the_head_travels(tmp_path):
    model = adapted("bert")
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    other = loaded("bert", tmp_path).merge_and_unload()
    assert torch.equal(other.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("options", [dict(), dict(modules_to_save=[]), dict(modules_to_save=["pooler"])])
def test_without_the_head_peft_uses_the_base_s_own(options, tmp_path):
    model = adapted("bert", **options)
    export_peft(model, tmp_path, head="modules_to_save" in options)
    base = MODELS["bert"]()
    base.classifier.load_state_dict(model.classifier.state_dict())
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(other, "bert"), logits(model, "bert"), **CLOSE)


def test_the_model_card(tmp_path):
    model = adapted("bert")
    model.config._name_or_path = "google-bert/bert-base-uncased"
    export_peft(model, tmp_path, expert="each")
    card = ModelCard.load(tmp_path / "expert_1" / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.library_name == "peft"
    assert "expert 1 of 3 experts of rank 2, alpha 6" in card.text
    assert "BertForSequenceClassification.from_pretrained('google-bert/bert-base-uncased', num_labels=2)" in card.text


def test_only_some_layers(tmp_path):
    model = adapted("bert", layers_to_transform=[1])
    export_peft(model, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert all("layer.1." in name for name in targets)
    torch.testing.assert_close(logits(loaded("bert", tmp_path), "bert"), logits(model, "bert"), **CLOSE)


def test_layers_of_different_rank(tmp_path):
    model = adapted("gpt2", target_modules=["c_attn", "mlp.c_fc"])
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], set(config["rank_pattern"].values())) == (4, {2})
    torch.testing.assert_close(logits(loaded("gpt2", tmp_path), "gpt2"), logits(model, "gpt2"), **CLOSE)


def test_what_cannot_be_exported_is_refused(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="got method 'adapter', expected 'lora'"):
        export_peft(adapt(tiny.tiny_bert(), AdaMixConfig()), folder)
    with pytest.raises(ValueError, match="without AdaMix"):
        export_peft(tiny.tiny_bert(), folder)
    for expert in (3, -1, True, "all"):
        with pytest.raises(ValueError, match=f"expert: got {expert!r}"):
            export_peft(adapted("bert"), folder, expert=expert)
    save_adamix(merge(adapted("bert")), tmp_path / "checkpoint")
    again = load_adamix(tiny.tiny_bert(), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="without experts"):
        export_peft(again, folder, expert=1)
    for expert in (0, "each"):
        with pytest.raises(ValueError, match=r"without experts for .*merge\(model, keep=False\) dropped them"):
            export_peft(merge(adapted("bert"), keep=False), folder, expert=expert)
    again.adamix.factors.clear()  # as from a checkpoint of version 2
    with pytest.raises(ValueError, match="without factors"):
        export_peft(again, folder)
    assert not folder.exists()


@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_merged_checkpoint_exports_the_same_bits(kind, tmp_path):
    model = adapted(kind)
    export_peft(model, tmp_path / "before")
    save_adamix(merge(model, keep=False), tmp_path / "checkpoint")
    export_peft(model, tmp_path / "merged")
    again = load_adamix(MODELS[kind](), tmp_path / "checkpoint")
    export_peft(again, tmp_path / "loaded")
    want = (tmp_path / "before" / "adapter_model.safetensors").read_bytes()
    for name in ("merged", "loaded"):
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == want
        assert (tmp_path / name / "adapter_config.json").read_text() == (
            tmp_path / "before" / "adapter_config.json"
        ).read_text()
    save_adamix(again, tmp_path / "again")
    export_peft(load_adamix(MODELS[kind](), tmp_path / "again"), tmp_path / "twice")
    assert (tmp_path / "twice" / "adapter_model.safetensors").read_bytes() == want


def test_a_base_that_is_a_folder_is_named_and_not_its_place(tmp_path):
    tiny.tiny_bert().save_pretrained(tmp_path / "private" / "encoder")
    base = type(tiny.tiny_bert()).from_pretrained(tmp_path / "private" / "encoder")
    export_peft(adapt(base, AdaMixConfig(method="lora")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "encoder"
    assert "private" not in (tmp_path / "out" / "README.md").read_text()
