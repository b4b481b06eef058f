"""export_peft of a head or an embedding that is trained whole and tied: PEFT, which copies both, computes the same."""

import json

import peft
import pytest
import tiny
import tiny_packs as tp
import torch
import transformers

from adamix_kernels import AdaMixConfig, adapt, export_peft, merge


def tied_llama():
    return tiny.tiny_llama(tie_word_embeddings=True)


def masked_bert():
    return tiny.tiny_bert(model_class=transformers.BertForMaskedLM)


BOTH = {"model.embed_tokens", "lm_head"}
CASES = [
    (tied_llama, ["embed_tokens"], BOTH),
    (tied_llama, ["lm_head"], BOTH),
    (tied_llama, ["lm_head", "embed_tokens"], BOTH),
    (tiny.tiny_llama, ["lm_head"], {"lm_head"}),
    (tiny.tiny_gpt2, ["wte"], {"transformer.wte", "lm_head"}),
    (tiny.tiny_t5, ["shared"], {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
    (masked_bert, ["cls"], {"cls", "bert.embeddings.word_embeddings"}),
    (masked_bert, ["decoder"], {"cls.predictions.decoder", "bert.embeddings.word_embeddings"}),
]


def adapted(build, saved, **options):
    config = AdaMixConfig(method="lora", num_experts=3, r=2, modules_to_save=saved, **options)
    return tp.randomise(adapt(build(), config), 3, 0.2).eval()


@pytest.mark.parametrize("case", range(len(CASES)))
def test_peft_computes_the_model(case, tmp_path):
    build, saved, named = CASES[case]
    model = adapted(build, saved)
    batch = tiny.batch_for(model)
    with torch.no_grad():
        want = model(**batch).logits
        assert not torch.allclose(want, build()(**batch).logits, atol=1e-2)
        for name, exported in (("experts", model), ("merged", merge(model))):
            export_peft(exported, tmp_path / name)
            config = json.loads((tmp_path / name / "adapter_config.json").read_text())
            assert set(config["modules_to_save"]) == named
            other = peft.PeftModel.from_pretrained(build(), tmp_path / name).eval()
            torch.testing.assert_close(other(**batch).logits, want, rtol=1e-4, atol=1e-4)


def test_a_lora_on_a_weight_that_is_trained_whole_is_refused(tmp_path):
    model = adapted(tied_llama, ["embed_tokens"], target_modules=["q_proj", "lm_head"])
    for exported in (model, merge(model)):
        with pytest.raises(ValueError, match=r"^lm_head: got a LoRA on a weight .* tied to model.embed_tokens"):
            export_peft(exported, tmp_path / "both")
        assert not (tmp_path / "both").exists()
    export_peft(model, tmp_path / "loras", head=False)


def test_a_merged_lora_on_a_tied_head_is_exported_as_it_was_trained_on(tmp_path):
    model = merge(adapted(tied_llama, [], target_modules=["q_proj", "lm_head"]))
    batch = tiny.batch_for(model)
    with torch.no_grad():
        tp.randomise(model, 4)
        other = peft.PeftModel.from_pretrained(tied_llama(), export_peft(model, tmp_path)).eval()
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
