"""adamix train: AdaMixTrainer on a text-classification set, with every flag of transformers' TrainingArguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..models.config import AdaMixConfig
from ..models.inject import adapt
from ..tasks import (
    DEFAULT_MODEL,
    EMBEDDED,
    Run,
    collator,
    load_classifier,
    load_task,
    resolve_model,
    tokenize,
    write_run,
)
from ._options import is_main_process, read_object, set_log_level

LAST = "last"

# Where they differ from TrainingArguments'; a flag or a JSON key overrides each.
DEFAULTS = {
    "output_dir": "adamix_out",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
    "report_to": "none",
}


@dataclass
class TrainOptions:
    """Model, data and adaptation; see AdaMixConfig for the latter."""

    model: str = field(default=DEFAULT_MODEL, metadata={"help": "hub id or folder of the encoder"})
    data: str = field(
        default=EMBEDDED, metadata={"help": "'remarks', a folder with train.tsv and dev.tsv, or a hub data set"}
    )
    pooling: str = field(
        default="model",
        metadata={"help": "what the head reads: model (the model's own pooler) or mean (hidden states)"},
    )
    max_tokens: int = field(default=128, metadata={"help": "longer texts are cut"})
    max_train_rows: int = field(default=0, metadata={"help": "use the first N training rows only; 0 is all"})
    max_eval_rows: int = field(default=0, metadata={"help": "use the first N dev rows only; 0 is all"})
    method: str = field(default="adapter", metadata={"help": "adapter or lora"})
    num_experts: int = field(default=4, metadata={"help": "M, the experts of a side that is not shared"})
    bottleneck: int = field(default=16, metadata={"help": "adapter width"})
    r: int = field(default=4, metadata={"help": "LoRA rank"})
    alpha: float = field(default=32.0, metadata={"help": "LoRA scaling is alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "on the LoRA input"})
    share: str = field(default="up", metadata={"help": "the shared side: up, down or none"})
    routing: str = field(default="batch", metadata={"help": "experts drawn per batch, sample or token"})
    consistency_weight: float = field(default=1.0, metadata={"help": "weight of the KL term; 0 is one pass"})
    target_modules: str = field(
        default="", metadata={"help": "regular expression of the layers to adapt; by the model's type when empty"}
    )
    resume: str = field(
        default="",
        metadata={
            "help": "go on from a checkpoint folder; alone, from the last one in --out",
            "nargs": "?",
            "const": LAST,
        },
    )

    def config(self) -> AdaMixConfig:
        return AdaMixConfig(
            method=self.method,
            num_experts=self.num_experts,
            bottleneck=self.bottleneck,
            r=self.r,
            alpha=self.alpha,
            dropout=self.lora_dropout,
            share=None if self.share.lower() == "none" else self.share,
            routing=self.routing,
            consistency_weight=self.consistency_weight,
            target_modules=self.target_modules or None,
        )


def main(argv: Sequence[str]) -> int:
    options, arguments = parse(argv)
    import transformers

    from ..models.trainer import AdaMixTrainer

    set_log_level(logging.WARNING if arguments.log_level == "passive" else arguments.get_process_log_level())
    if not is_main_process():
        transformers.logging.disable_progress_bar()
    config, checkpoint = options.config(), _checkpoint(options, arguments)
    encoder = resolve_model(options.model)
    task = load_task(options.data, task="classification")
    transformers.set_seed(arguments.seed)
    model, tokenizer = load_classifier(encoder, task.label_names, options.pooling)
    adapt(model, config)
    trainer = AdaMixTrainer(
        model=model,
        args=arguments,
        train_dataset=tokenize(task.train.head(options.max_train_rows or None), tokenizer, options.max_tokens),
        eval_dataset=tokenize(task.dev.head(options.max_eval_rows or None), tokenizer, options.max_tokens),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=_accuracy,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        run = Run(options.model, options.data, task.label_names, options.max_tokens, options.pooling)
        write_run(arguments.output_dir, run)
        print(f"dev accuracy {100 * metrics['eval_accuracy']:.2f} % (merged); checkpoint: {arguments.output_dir}")
    return 0


def parse(argv: Sequence[str]) -> tuple[TrainOptions, Any]:
    """(TrainOptions, TrainingArguments) from flags, or from the one JSON file that argv names.

    Raises ValueError for a JSON file that is not an object, or has a key that is no option.
    """
    from transformers import HfArgumentParser, TrainingArguments

    parts: Any = (TrainOptions, TrainingArguments)
    if len(argv) == 1 and argv[0].endswith(".json"):
        values = read_object(argv[0])
        if "out" in values:
            values["output_dir"] = values.pop("out")
        if isinstance(values.get("resume"), bool):
            values["resume"] = LAST if values["resume"] else ""
        options, arguments = HfArgumentParser(parts).parse_dict({**DEFAULTS, **values})
        return cast("TrainOptions", options), arguments
    parser = HfArgumentParser(
        parts,
        prog="adamix train",
        description="Fine-tune an encoder with AdaMix. Instead of flags, one JSON file of them may be given.",
    )
    parser.add_argument("--out", dest="output_dir", help="the same as --output-dir")
    parser.set_defaults(**DEFAULTS)
    options, arguments = parser.parse_args_into_dataclasses(list(argv))
    return cast("TrainOptions", options), arguments


def _checkpoint(options: TrainOptions, arguments: Any) -> str | None:
    """The checkpoint to go on from, or None. Raises ValueError where --out has another run's and none is asked for."""
    from transformers.trainer_utils import get_last_checkpoint

    from ..models.manifest import newest_whole_checkpoint

    wanted = options.resume or arguments.resume_from_checkpoint
    folder = arguments.output_dir
    if wanted == LAST:
        last = newest_whole_checkpoint(folder)
        if last is None:
            raise ValueError(f"resume: {folder!r} holds no checkpoint to go on from that is whole")
        return last
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if not wanted and last is not None:
        raise ValueError(
            f"out: {folder!r} holds {os.path.basename(last)} of an earlier run, expected --resume, or another folder"
        )
    if wanted and not os.path.isdir(wanted):
        raise ValueError(f"resume: {wanted!r}: no such folder")
    return wanted or None


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
