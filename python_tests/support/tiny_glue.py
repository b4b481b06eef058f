"""Tiny data in the layout of every labelled task's own files, and a tiny RoBERTa that knows their words."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

TEXT = ("the", "film", "meal", "story", "place", "was", "is", "a", "good", "bad", "very", "not", "?", ".", ",")
# What the published prompts consist of.
PROMPT = ("Yes", "Maybe", "No", "great", "terrible", "subjective", "objective", "It", "This")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# task: header (None where there is none), labels; a row is made of two texts and a label.
LAYOUTS = {
    "mnli": ("index sentence1 sentence2 gold_label", ("entailment", "neutral", "contradiction")),
    "qnli": ("index question sentence label", ("entailment", "not_entailment")),
    "rte": ("index sentence1 sentence2 label", ("entailment", "not_entailment")),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", ("0", "1")),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", ("0", "1")),
    "cola": (None, ("0", "1")),
    "stsb": ("index sentence1 sentence2 score", ("0.5", "2.25", "5.0")),
    **dict.fromkeys(("sst2", "subj", "mpqa", "minilm"), ("sentence label", ("0", "1"))),
}


def write_task(folder, task, train=36, dev=6):
    header, labels = LAYOUTS[task]
    dev_name = "dev_matched" if task == "mnli" else "dev"
    columns = ["source", "label", "mark", "text"] if header is None else header.split("|" if "|" in header else None)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), (dev_name, dev)):
        lines = [] if header is None else ["\t".join(columns)]
        lines += ["\t".join(_cell(c, i, labels) for c in columns) for i in range(rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _cell(column, i, labels):
    if column in ("label", "gold_label", "is_duplicate", "Quality", "score"):
        return labels[i % len(labels)]
    if column in ("sentence1", "question1", "question", "#1 String", "text"):
        return f"the {TEXT[1 + i % 4]} was {TEXT[8 + i % 2]} ."
    if column in ("sentence2", "question2", "sentence", "#2 String"):
        return f"a {TEXT[8 + i % 2]} {TEXT[1 + i % 3]}"
    return "" if column == "mark" else str(i)


def write_roberta(folder):
    """A 2-layer RoBERTa of width 16 with its masked head, and a tokenizer whose words are whole tokens."""
    torch.manual_seed(3)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *TEXT, *PROMPT))}
    config = transformers.RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
