"""AdaMixTrainerMixin over TRL's SFTTrainer: the same losses as AdaMixTrainer, and its checkpoints."""

import logging

import pytest
import tiny
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, load_adamix, merge
from adamix_kernels.models.trainer import AdaMixTrainerMixin

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")


class AdaMixSFTTrainer(AdaMixTrainerMixin, trl.SFTTrainer):
    pass


class _Seed(TrainerCallback):
    """The same experts in both trainers, which draw other numbers before and between the steps."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(5 + state.global_step)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, tiny.VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


def texts(count=12):
    """Ragged, so that padding and the number of targets matter."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 9, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(4, 60, (n,), generator=generator).tolist()) for n in lengths]


def options(folder, **more):
    return dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, learning_rate=1e-2, seed=3, disable_tqdm=True, save_steps=3, **more,
    )  # fmt: skip


def adapted(build, **more):
    torch.manual_seed(0)
    return adapt(build(), AdaMixConfig(bottleneck=4, num_experts=2, consistency_weight=2.0, **more))


def losses(trainer):
    names = ("loss", "cross_entropy", "consistency", "grad_norm")
    return [[log[name] for name in names] for log in trainer.state.log_history if "cross_entropy" in log]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_llama])
def test_the_losses_of_adamix_trainer(build, accumulation, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    more = dict(gradient_accumulation_steps=accumulation, gradient_checkpointing=False)
    data = datasets.Dataset.from_list([{"text": text} for text in texts()])
    model = adapted(build)
    sft = AdaMixSFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path / "sft", **more)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=[_Seed()],
    )
    sft.train()
    rows = [{"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]} for text in texts()]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    plain = AdaMixTrainer(
        model=adapted(build),
        args=TrainingArguments(**options(tmp_path / "plain", **more)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[_Seed()],
    )
    plain.train()
    assert len(losses(sft)) == 3
    torch.testing.assert_close(torch.tensor(losses(sft)), torch.tensor(losses(plain)), rtol=1e-5, atol=1e-6)
    assert losses(sft)[-1][2] > 0  # the experts have parted
    assert not any("second pass" in record.getMessage() for record in caplog.records)

    # Evaluation is SFTTrainer's own, of the merged experts; the checkpoint holds them.
    metrics = sft.evaluate()
    assert {"eval_loss", "eval_mean_token_accuracy"} <= set(metrics)
    batch = tiny.batch_for(model)
    loaded = load_adamix(build(), tmp_path / "sft" / "checkpoint-3").eval()
    with torch.no_grad():
        want = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, want)
        torch.testing.assert_close(merge(loaded)(**batch).logits, want, rtol=1e-5, atol=1e-6)
    again = AdaMixSFTTrainer(
        model=adapted(build),
        args=trl.SFTConfig(**{**options(tmp_path / "sft", **more), "max_steps": 4}),
        train_dataset=data,
        processing_class=tokenizer,
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_the_stock_sft_trainer_is_warned(tokenizer, tmp_path, caplog):
    data = datasets.Dataset.from_list([{"text": text} for text in texts()])
    args = trl.SFTConfig(**options(tmp_path, gradient_checkpointing=False, save_strategy="no"))
    trainer = trl.SFTTrainer(model=adapted(tiny.tiny_gpt2), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert sum("AdaMix's second pass" in record.getMessage() for record in caplog.records) == 1


def test_what_the_mixin_would_lose_is_refused(tokenizer, tmp_path):
    data = datasets.Dataset.from_list([{"text": text} for text in texts()])
    base = options(tmp_path, gradient_checkpointing=False)
    with pytest.raises(ValueError, match=r"args\.loss_type: got 'dft', expected 'nll'"):
        AdaMixSFTTrainer(
            model=adapted(tiny.tiny_gpt2),
            args=trl.SFTConfig(**base, loss_type="dft"),
            train_dataset=data,
            processing_class=tokenizer,
        )
    model = adapted(tiny.tiny_gpt2).train()
    trainer = AdaMixSFTTrainer(model=model, args=trl.SFTConfig(**base), train_dataset=data, processing_class=tokenizer)
    packed = {**tiny.batch_for(model), "cu_seq_lens_q": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match=r"inputs: got cu_seq_lens_q, a packed batch.*packing=False"):
        trainer.compute_loss(model, packed)
    batch = tiny.batch_for(model, batch=1)
    row = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": torch.tensor([[*range(4)] * 2])}
    apart = trainer.compute_loss(model, row)  # a mask is made of the positions
    assert apart.isfinite()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"inputs: got position_ids that begin anew, a packed batch"):
        trainer.compute_loss(model, row)
