"""summary and print_trainable_parameters: numbers against the paper, against PEFT, and against the model."""

import peft
import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification

from adamix_kernels import AdaMixConfig, adapt, load_adamix, merge, print_trainable_parameters, save_adamix, summary


def cells(text):
    """layers -> the other columns of its row; the row of sums is "all"."""
    rows = [line.split("  ") for line in text.splitlines() if not line.startswith("---")]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in rows if len(row) == len(rows[1]) or row[0] == "all"}


def test_the_paper_s_bert():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(vocab_size=100))
    adapt(model, AdaMixConfig(bottleneck=48))
    text = summary(model)
    assert text.startswith("BertForSequenceClassification: AdaMix adapter, 4 experts, share up, routing per batch, not")
    row = ["12", "3072 -> 768", "adapter 48, gelu", "4/1", "2,223,360", "894,528"]
    assert cells(text)["bert.encoder.layer.{0-11}.output.dense"] == row
    assert cells(text)["all"] == ["12", "2,223,360", "894,528"]
    assert "trained and saved whole: classifier (1,538 parameters)" in text
    assert "trainable: 2,224,898 of " in text
    assert len({len(line) for line in text.splitlines()[1:3]}) == 1
    merged = summary(merge(model))
    assert cells(merged)["all"] == ["12", "894,528", "894,528"]
    assert "routing per batch, merged" in merged


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_t5, tiny.tiny_llama])
def test_the_sums_are_those_of_the_banks(build):
    model = adapt(build(), AdaMixConfig(method="lora", num_experts=3, share=None))
    banks = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    rows = cells(summary(model))
    assert rows["all"] == [str(len(model.adamix.paths)), f"{banks:,}", "0"]
    assert sum(int(row[0]) for name, row in rows.items() if name not in ("all", "layers")) == len(model.adamix.paths)
    assert cells(summary(merge(model)))["all"] == [str(len(model.adamix.paths)), "0", "0"]


def test_rows_and_columns_of_gpt2_and_of_chosen_layers():
    rows = cells(summary(adapt(tiny.tiny_gpt2(), AdaMixConfig(method="lora"))))
    assert rows["transformer.h.{0,1}.attn.c_attn"][1:4] == ["32 -> 96", "lora 4, alpha 32, 2 slices", "4/1"]
    rows = cells(summary(adapt(tiny.tiny_bert(), AdaMixConfig(layers_to_transform=[1], share="down", bottleneck=8))))
    assert rows["bert.encoder.layer.1.output.dense"][:4] == ["1", "64 -> 32", "adapter 8, gelu", "1/4"]


def test_a_merged_checkpoint_has_a_summary_too(tmp_path):
    save_adamix(merge(adapt(tiny.tiny_bert(), AdaMixConfig(method="lora"))), tmp_path)
    rows = cells(summary(load_adamix(tiny.tiny_bert(), tmp_path)))
    assert rows["bert.encoder.layer.{0,1}.attention.self.query"] == [
        "2", "32 -> 32", "lora, in the weight", "0/0", "0", "0"
    ]  # fmt: skip


def test_only_adapted_models_have_one():
    with pytest.raises(ValueError, match="without AdaMix"):
        summary(tiny.tiny_bert())


def test_the_words_and_the_numbers_of_peft(capsys):
    """One expert is PEFT's LoRA, but for the frozen merge scores (one number a side and layer)."""
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model(tiny.tiny_bert(), config)
    theirs.print_trainable_parameters()
    want = capsys.readouterr().out
    model = adapt(tiny.tiny_bert(), AdaMixConfig(method="lora", r=4, num_experts=1, share=None))
    trainable, total = print_trainable_parameters(model)
    found = capsys.readouterr().out
    assert found.split("||")[0] == want.split("||")[0]
    head = sum(p.numel() for p in model.classifier.parameters())  # PEFT keeps the original beside the copy
    assert (trainable, total - 2 * len(model.adamix.paths) + head) == theirs.get_nb_trainable_parameters()
    assert (
        found
        == f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
