"""Families beyond the five of tiny.py: default targets, a training step, merging, checkpoints, in-place additions."""

import peft
import pytest
import torch
from tiny_families import ENCODERS, FAMILIES, adapted, batch_for, build, logits, spread
from tiny_training import rows_of, trainer_for

from adamix_kernels import adamix_loss, double_batch, load_adamix, merge, save_adamix
from adamix_kernels.convert import export_peft
from adamix_kernels.models.families import ADAPTER_TARGETS

METHODS = [
    (kind, method) for kind in FAMILIES for method in ("adapter", "lora") if FAMILIES[kind][3] or method == "lora"
]
TRAINED_BY_TRAINER = [kind for kind in FAMILIES if kind not in ("mixtral",)]


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_a_step_merging_and_a_checkpoint(kind, method, tmp_path):
    model = adapted(kind, method)
    assert len(model.adamix.paths) == FAMILIES[kind][3 if method == "adapter" else 4]
    batch = batch_for(kind)
    labels = batch.pop("labels")
    if kind == "whisper":
        batch["decoder_input_ids"] = labels
    options = {} if kind in ENCODERS else {"use_cache": False}
    out = model.train()(**double_batch(batch), **options).logits
    adamix_loss(out, labels).loss.backward()
    banks = [
        p for n, p in model.named_parameters() if p.requires_grad and any(n.startswith(q) for q in model.adamix.paths)
    ]
    assert all(p.grad is not None for p in banks)
    assert sum(p.grad.abs().sum() for p in banks) > 0
    spread(model)
    want = logits(model, kind)
    assert not torch.allclose(want, logits(build(kind), kind), atol=1e-3)
    save_adamix(model, tmp_path)
    assert torch.equal(logits(load_adamix(build(kind), tmp_path).eval(), kind), want)
    torch.testing.assert_close(logits(merge(model), kind), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINED_BY_TRAINER)
def test_the_trainer_takes_it(kind, tmp_path):
    model = adapted(kind)
    trainer = trainer_for(model, tmp_path, rows_of(batch_for(kind, 8)), per_device_train_batch_size=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "cross_entropy" in log]
    assert len(logs) == 2
    assert all(torch.isfinite(torch.tensor([log["loss"], log["consistency"]])).all() for log in logs)


def test_mixtral_has_no_default_for_adapters_and_says_what_it_has():
    with pytest.raises(ValueError, match=r"'mixtral', which has no default for method 'adapter'.*q_proj, k_proj, v_pr"):
        adapted("mixtral")


@pytest.mark.parametrize("kind", ["whisper", "vit"])
def test_peft_loads_what_reads_no_text(kind, tmp_path):
    """Its classes for tasks pass on input_ids alone: task_type must be None."""
    model = spread(adapted(kind, "lora", task_type="SEQ_2_SEQ_LM" if kind == "whisper" else None))
    want = logits(model, kind)
    export_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert other.peft_config["default"].task_type is None
    torch.testing.assert_close(logits(other, kind), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_falcon_adds_in_place(method, routing):
    """mlp_output += attention_output, right behind the adapted layer."""
    model = adapted("falcon", method, routing=routing, target_modules=["mlp.dense_4h_to_h"]).train()
    batch = batch_for("falcon")
    batch["labels"] = double_batch(batch["labels"])
    model(**double_batch({k: v for k, v in batch.items() if k != "labels"}), labels=batch["labels"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_every_adapter_default_is_tried_somewhere():
    others = set(ADAPTER_TARGETS) - set(FAMILIES)
    assert others == {
        "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie", "distilbert",
        "gpt2", "t5", "mt5", "bart", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
        "olmo2", "smollm3",
    }  # fmt: skip
