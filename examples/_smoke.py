"""What --smoke runs on: tiny random models with a tokenizer, and made-up data, written into a folder."""

import contextlib
import functools
import random
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD, BAD = ("fine", "lovely", "great"), ("dull", "awful", "terrible")
THINGS = ("film", "meal", "story", "hotel", "song", "place")
WORDS = (*GOOD, *BAD, *THINGS, "the", "was", "it", "very", "a", "called", "near", ".", ":", "|", "name", "food", "and")
# Random weights this wide pass on which words they saw; with the usual 0.02 nothing could be learnt.
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "initializer_range": 0.3}
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **SIZES)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3, **SIZES)


@contextlib.contextmanager
def shared_folder():
    """A temporary folder, the first process's for all of a launch (torchrun, accelerate launch)."""
    with tempfile.TemporaryDirectory() as own:
        places = [own]
        broadcast_object_list(places)
        yield Path(places[0])
        PartialState().wait_for_everyone()


def by_the_first(write):
    """Of a launch the first process writes, and the others wait for it."""

    @functools.wraps(write)
    def written(folder: Path, *arguments, **options) -> str:
        state = PartialState()
        if state.is_main_process:
            write(folder, *arguments, **options)
        state.wait_for_everyone()
        return str(folder)

    return written


def encoder(folder: Path, masked: bool = False) -> str:
    kind = transformers.BertForMaskedLM if masked else transformers.BertModel
    return _write(folder, kind, transformers.BertConfig(**BERT))


def causal_lm(folder: Path) -> str:
    return _write(folder, transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2))


@by_the_first
def sentences(
    folder: Path,
    rows: int = 48,
    things: tuple[str, ...] = THINGS,
    turned: bool = False,
    line: str = "the {thing} was very {word} .",
) -> None:
    """train.tsv and dev.tsv: good or bad by one word, or the other way round where `turned`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split in ("train", "dev"):
        lines = ["sentence\tlabel"]
        for i in range(rows):
            word = draw.choice((BAD, GOOD)[i % 2])
            lines.append(f"{line.format(thing=draw.choice(things), word=word)}\t{(i + turned) % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@by_the_first
def restaurants(folder: Path, rows: int = 24) -> None:
    """train.txt and valid.txt: `meaning||text` on each line, as in the E2E challenge."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split in ("train", "valid"):
        lines = []
        for _ in range(rows):
            name, word = draw.choice(THINGS), draw.choice((*GOOD, *BAD))
            lines.append(f"name : {name} | food : {word}||the {name} was a {word} place .")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@by_the_first
def _write(folder: Path, kind, config) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if config.model_type == "bert":
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
