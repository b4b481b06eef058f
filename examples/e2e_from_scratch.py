"""A small GPT-2 trained from scratch on part of E2E's texts, then adapted to the rest: LoRA against AdaMix-LoRA.

On made-up data, in seconds:

    python examples/e2e_from_scratch.py --smoke

On E2E's own files (a folder of texts, `meaning||text` on each line): pubs and coffee shops teach the model to write,
the meanings with "Type : restaurant" are what it is adapted to. No meaning of the test part was seen in training.

    python examples/e2e_from_scratch.py --data e2e --out e2e_out --seeds 3
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import _smoke
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adamix_kernels.recipes import Limits, expand_methods, load_recipe, run_recipe
from adamix_kernels.recipes.problems import TextProblem
from adamix_kernels.recipes.summary import group_rows, markdown

END, PAD = "<|endoftext|>", "<|pad|>"
SIZES = dict(n_embd=128, n_layer=3, n_head=4, n_positions=256)
# Fewer and larger steps than the published ones, which are for a model hundreds of times this size.
ADAPT = {
    "training.learning_rate": 3e-3, "training.warmup_ratio": 0.06, "training.per_device_train_batch_size": 16,
    "training.per_device_eval_batch_size": 32, "training.num_train_epochs": 5, "generation.stop_ids": [],
    "generation.batch_size": 16, "metrics": ["bleu", "rouge_l"],
}  # fmt: skip


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="e2e", help="folder; every .txt of it is read")
    parser.add_argument("--adapt-to", default="Type : restaurant", help="meanings with this are held back to adapt to")
    parser.add_argument("--out", type=Path, default=Path("e2e_out"))
    parser.add_argument("--methods", nargs="+", default=["lora", "adamix", "adamix:consistency_weight=1", "full"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5, help="of training from scratch, and again of adapting")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of training from scratch")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="made-up data and a tiny model, in a temporary folder")
    return parser.parse_args(arguments)


def read(folder):
    """{meaning: [line, ...]} of every file, in order."""
    found = {}
    for path in sorted(Path(folder).glob("*.txt")):
        for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
            found.setdefault(line.partition("||")[0].strip(), []).append(line.strip())
    if not found:
        raise FileNotFoundError(f"{folder}: no .txt with `meaning||text` lines, expected E2E's files")
    return found


def split(lines, word, folder):
    """base/ and rest/ with train.txt, valid.txt and test.txt each: 80, 10 and 10 % of the meanings, in drawn order."""
    parts = {"base": [m for m in lines if word not in m], "rest": [m for m in lines if word in m]}
    for name, meanings in parts.items():
        if len(meanings) < 3:
            raise ValueError(f"--adapt-to: got {word!r}, which leaves {len(meanings)} meanings in {name}, expected 3")
        random.Random(0).shuffle(meanings)
        tenth = max(1, len(meanings) // 10)
        cut = {"test": meanings[:tenth], "valid": meanings[tenth : 2 * tenth], "train": meanings[2 * tenth :]}
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part, chosen in cut.items():
            text = "\n".join(line for meaning in chosen for line in lines[meaning])
            (folder / name / f"{part}.txt").write_text(text + "\n", encoding="utf-8")


def write_model(folder, texts, vocabulary):
    """Random weights, and a byte-level BPE learnt from the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet)
    )
    names = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **ends, **SIZES)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def train_from_scratch(problem, options, folder):
    """Every weight, on base/; saved over the random weights of `folder`."""
    model = problem.fresh()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), num_train_epochs=options.epochs, per_device_train_batch_size=16,
        learning_rate=options.learning_rate,
        warmup_steps=20, lr_scheduler_type="cosine", save_strategy="no", report_to="none", logging_steps=50,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=problem.train_rows(0), data_collator=problem.collate,
        compute_loss_func=problem.loss,
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(folder)
    return model


def main(options):
    transformers.set_seed(0)
    lines = read(options.data)
    split(lines, options.adapt_to, options.out)
    model_folder = options.out / "model"
    texts = (options.out / "base" / "train.txt").read_text(encoding="utf-8").splitlines()
    write_model(model_folder, texts, options.vocabulary)
    recipe = load_recipe("nlg/lora/e2e").changed({**ADAPT, "training.num_train_epochs": options.epochs})
    # Only the frozen model of the adapting drops nothing, as published.
    base = recipe.changed({"model": str(model_folder), "data": str(options.out / "base"), "model_config": {}})
    model = train_from_scratch(TextProblem(base, Limits()), options, model_folder)
    recipe = recipe.changed({"model": str(model_folder), "data": str(options.out / "rest")})
    problem = TextProblem(recipe, Limits())
    problem.fresh()
    print("before adapting:", json.dumps(problem.scores(model).values))
    rows = run_recipe(
        recipe, expand_methods(options.methods, recipe), range(options.seeds), options.out / "results.jsonl"
    )
    for row in rows:
        print(row["method"], row["seed"], json.dumps(row["scores"]))
    print(markdown(group_rows(rows)))


if __name__ == "__main__":
    chosen = parse()
    if chosen.smoke:
        with tempfile.TemporaryDirectory() as folder:
            chosen.data, chosen.out = _smoke.restaurants(Path(folder, "e2e")), Path(folder, "out")
            chosen.adapt_to, chosen.seeds, chosen.epochs, chosen.vocabulary = "food : great", 1, 30, 300
            chosen.methods, chosen.learning_rate = ["lora", "adamix:consistency_weight=1"], 1e-2
            SIZES.update(n_embd=32, n_layer=2, n_head=2)
            ADAPT["generation.beams"] = 3
            main(chosen)
    else:
        main(chosen)
