"""AdaMix-LoRA in GPT-2 on a data-to-text task, merged into the weights, then text from the dev part.

On tiny random weights and made-up data, in seconds:

    python examples/nlg.py --smoke

On the E2E challenge (folder with train.txt and valid.txt, `meaning||text` on each line), with the paper's settings:

    python examples/nlg.py --model openai-community/gpt2-medium --data e2e --num_experts 8 --consistency_weight 100 \
        --learning_rate 2e-4 --num_train_epochs 20 --per_device_train_batch_size 8 --warmup_steps 2000 \
        --label_smoothing_factor 0.1 --max_grad_norm 0 --output_dir e2e_out
"""

from dataclasses import dataclass, field
from pathlib import Path

import _smoke
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, export_peft, merge

IGNORED = -100


@dataclass
class Options:
    model: str = field(default="openai-community/gpt2", metadata={"help": "folder or hub id of a causal model"})
    data: str = field(default="e2e", metadata={"help": "folder with train.txt and valid.txt"})
    num_experts: int = 8
    r: int = 4
    alpha: float = 32.0
    lora_dropout: float = 0.1
    consistency_weight: float = 1.0
    max_tokens: int = 512
    beams: int = 10
    shown: int = field(default=5, metadata={"help": "how many generated texts to print"})
    smoke: bool = field(default=False, metadata={"help": "tiny random model and made-up data"})


def parse(arguments=None):
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(output_dir="nlg_out", learning_rate=2e-4, report_to="none", save_strategy="epoch")
    return parser.parse_args_into_dataclasses(arguments)


def read(path):
    """[(meaning, text)] of each line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [tuple(part.strip() for part in line.split("||", 1)) for line in lines if line.strip()]


def encode(pairs, tokenizer, max_tokens):
    """The loss is on the text alone: the meaning's tokens are labelled -100."""
    rows = []
    for meaning, text in pairs:
        start = tokenizer(meaning)["input_ids"] + [tokenizer.bos_token_id]
        end = tokenizer(" " + text)["input_ids"] + [tokenizer.eos_token_id]
        ids, labels = start + end, [IGNORED] * len(start) + end
        rows.append({"input_ids": ids[:max_tokens], "labels": labels[:max_tokens]})
    return rows


def collate(rows, pad):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": [row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows],
        "labels": [row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in rows],
    }
    return {name: torch.tensor(values) for name, values in batch.items()}


def generate(model, tokenizer, meaning, beams):
    ids = torch.tensor([tokenizer(meaning)["input_ids"] + [tokenizer.bos_token_id]], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        length_penalty=0.8,
        no_repeat_ngram_size=4,
        max_new_tokens=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main(options, args):
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoConfig.from_pretrained(options.model)
    if base.model_type == "gpt2":  # as the reference project's: the KL would measure what a frozen base drops
        base.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model = AutoModelForCausalLM.from_pretrained(options.model, config=base)
    config = AdaMixConfig(
        method="lora",
        num_experts=options.num_experts,
        r=options.r,
        alpha=options.alpha,
        dropout=options.lora_dropout,
        consistency_weight=options.consistency_weight,
    )
    adapt(model, config)
    train, dev = (read(Path(options.data, f"{split}.txt")) for split in ("train", "valid"))
    trainer = AdaMixTrainer(
        model,
        args,
        train_dataset=encode(train, tokenizer, options.max_tokens),
        eval_dataset=encode(dev, tokenizer, options.max_tokens),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    print(f"dev loss {trainer.evaluate()['eval_loss']:.4f} of the merged experts")
    if not trainer.is_world_process_zero():
        return
    export_peft(model, Path(args.output_dir) / "peft")
    merge(model).eval()
    for meaning in list(dict(dev))[: options.shown]:
        print(f"{meaning}\n    -> {generate(model, tokenizer, meaning, options.beams)}")


if __name__ == "__main__":
    options, args = parse()
    if options.smoke:
        with _smoke.shared_folder() as folder:
            options.model = _smoke.causal_lm(Path(folder, "model"))
            options.data = _smoke.restaurants(Path(folder, "data"))
            options.beams, options.shown = 2, 2
            args.output_dir, args.max_steps, args.learning_rate = str(Path(folder, "out")), 40, 3e-2
            main(options, args)
    else:
        main(options, args)
    PartialState().destroy_process_group()  # under accelerate launch; nothing to do in one process
