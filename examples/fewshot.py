"""Few-shot learning with a prompt: a masked language model fills in the label's word, AdaMix adapters learn to.

On tiny random weights and made-up data, in seconds:

    python examples/fewshot.py --smoke

With 30 labelled sentences for each of five seeds and no validation set, as in the paper:

    python examples/fewshot.py --model FacebookAI/roberta-large --data stanfordnlp/sst2 --words terrible great \
        --template "{} It was {mask} ." --shots 30 --seeds 5
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import _smoke
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorWithPadding, TrainingArguments, set_seed

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt
from adamix_kernels.tasks import load_task

IGNORED = -100


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="FacebookAI/roberta-large", help="folder or hub id of a masked model")
    parser.add_argument("--data", default="stanfordnlp/sst2", help="folder or file, or hub data set")
    parser.add_argument("--template", default="{} It was {mask} .", help="{} is the text, {mask} the word to fill in")
    parser.add_argument("--words", nargs="+", default=["terrible", "great"], help="one word a label, in label order")
    parser.add_argument("--shots", type=int, default=30, help="labelled examples in all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bottleneck", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="tiny random model and made-up data")
    return parser.parse_args(arguments)


def word_ids(words, tokenizer):
    ids = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in words]
    wrong = [word for word, parts in zip(words, ids, strict=True) if len(parts) != 1]
    if wrong:
        raise SystemExit(f"--words: {wrong} are not one token each")
    return [parts[0] for parts in ids]


def encode(split, tokenizer, words, template, max_tokens):
    """One row a text: the label's word at the mask, -100 elsewhere."""
    before, after = (part.replace("{mask}", tokenizer.mask_token) for part in template.split("{}", 1))
    room = max_tokens - len(tokenizer(before + after)["input_ids"])
    rows = []
    for text, label in zip(split.texts, split.labels, strict=True):
        short = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:room])
        ids = tokenizer(before + short + after)["input_ids"]
        at = ids.index(tokenizer.mask_token_id)
        rows.append({"input_ids": ids, "at": at, "label": label, "word": words[label]})
    return rows


def collator(tokenizer):
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows):
        batch = dict(pad([{"input_ids": row["input_ids"]} for row in rows]))
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            batch["labels"][i, row["at"]] = row["word"]
        return batch

    return collate


@torch.inference_mode()
def accuracy(model, rows, words, collate, batch=64):
    """Share of rows whose label's word has the largest logit among the words; experts merged."""
    model.eval()
    right = 0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        inputs = {name: value.to(model.device) for name, value in collate(some).items() if name != "labels"}
        at = torch.tensor([row["at"] for row in some])
        logits = model(**inputs).logits.cpu()[torch.arange(len(some)), at][:, words]
        right += int((logits.argmax(-1) == torch.tensor([row["label"] for row in some])).sum())
    return right / len(rows)


def main(options):
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task, words = load_task(options.data, task="classification"), word_ids(options.words, tokenizer)
    if len(words) != task.num_labels:
        raise SystemExit(f"--words: got {len(words)}, expected one for each of {task.label_names}")
    train, dev = (
        encode(split, tokenizer, words, options.template, options.max_tokens) for split in (task.train, task.dev)
    )
    collate, results = collator(tokenizer), []
    for seed in range(options.seeds):
        set_seed(seed)
        model = adapt(AutoModelForMaskedLM.from_pretrained(options.model), AdaMixConfig(bottleneck=options.bottleneck))
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                learning_rate=options.lr,
                per_device_train_batch_size=8,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                seed=seed,
            )
            shots = random.Random(seed).sample(train, min(options.shots, len(train)))
            AdaMixTrainer(model, args, train_dataset=shots, data_collator=collate).train()
        results.append(accuracy(model, dev, words, collate))
        print(f"seed {seed}: accuracy {results[-1]:.4f}")
    spread = statistics.stdev(results) if len(results) > 1 else 0.0
    print(f"mean {statistics.mean(results):.4f}, standard deviation {spread:.4f}, {len(dev)} texts")


if __name__ == "__main__":
    options = parse()
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            options.model = _smoke.encoder(Path(folder, "model"), masked=True)
            options.data = _smoke.sentences(Path(folder, "data"))
            options.template, options.seeds, options.epochs = "{} it was {mask} .", 2, 5
            options.lr = 1e-2
            main(options)
    else:
        main(options)
