"""The options of adamix train that are not the Trainer's, in the groups that --help shows."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ..models.config import AdaMixConfig
from ..routing import LEARNED
from ..tasks import DEFAULT_MODEL, EMBEDDED
from ._options import at_least, option
from ._parser import names, numbers

LAST = "last"
NO_PRESET = "none"
# Of fields whose option has another name.
_SPELLED = {"dropout": "lora_dropout"}
Tasks = Literal["auto", "classification", "regression", "generation"]
Poolings = Literal["auto", "mean", "model"]
Presets = Literal["none", "hydra_lora", "lora_moe", "mola", "smear"]


@dataclass
class DataOptions:
    _argument_group_name = "model and data"

    model: str = option("hub id or folder", DEFAULT_MODEL)
    data: str = option(
        "'remarks', a file or a folder (TSV, CSV, JSONL, Parquet; GLUE's own files too), or a hub data set", EMBEDDED
    )
    task: Tasks = option("what the labels are: classes, numbers, or texts to write; auto: by the labels", "auto")
    text_column: str | None = option("column of the text, or of what a generation reads")
    text_pair_column: str | None = option("column of the second text of a pair")
    label_column: str | None = option("column of the label, or of the text to write")
    task_column: str | None = option("column of the name of each text's task, for --router task")
    dev_fraction: float = option(
        "of the training rows, the same ones whatever the seed, where the data has no dev split", 0.1
    )
    max_tokens: int = option("longer texts are cut", 128)
    max_train_rows: int = option("a sample of so many training rows, drawn by the seed; 0 is all", 0)
    max_eval_rows: int = option("a sample of so many dev rows; 0 is all", 0)
    pooling: Poolings = option(
        "what the head reads: the mean of the hidden states, or what the model's own head does; auto: the mean "
        "where that is a pooler or the first token",
        "auto",
    )


@dataclass
class AdaptationOptions:
    """See AdaMixConfig."""

    _argument_group_name = "AdaMix"

    preset: Presets = option(
        "a mixture by name, with its own defaults: hydra_lora, lora_moe, mola or smear; what is given beside it counts",
        "none",
    )
    method: str = option("adapter or lora", "adapter")
    num_experts: int = option("M, the experts of a side that is not shared", 4)
    bottleneck: int = option("adapter width", 16)
    r: int = option("LoRA rank", 4, aliases=["--lora_r", "--lora-r"])
    alpha: float = option("LoRA scaling is alpha / r", 32.0, aliases=["--lora_alpha", "--lora-alpha"])
    lora_dropout: float = option("on the LoRA input", 0.0)
    share: str = option("the shared side: up, down or none", "up")
    routing: str = option("experts drawn per batch, sample or token; or learned: gates weigh them", "batch")
    consistency_weight: float | None = option("weight of the KL term; 0 is one pass (default: 1; 0 with learned)")
    router: str = option("with learned, what makes the gates: linear, threshold, sentence, arrow or task", "linear")
    top_k: int = option("with learned, experts a token is sent to; 0 is all", 0)
    mix: str = option("with learned, what the gates weigh: outputs, or weights", "outputs")
    balance_weight: float = option("with learned, weight of the load-balance loss", 0.01)
    z_weight: float = option("with learned, weight of the router's z-loss", 0.0)
    experts_pattern: list[str] = option("with learned, experts by depth (2 4 6 8: MoLA)", [])
    target_modules: list[str] = option(
        "layers to adapt: names (a b or a,b), one regular expression, or all-linear; by the model's type when empty", []
    )
    exclude_modules: list[str] = option("layers to leave out: names, or one regular expression", [])
    layers_to_transform: list[str] = option("numbers of the transformer layers to adapt (0 1 or 0,1)", [])
    layers_pattern: list[str] = option("names that may stand before the layer's number", [])
    modules_to_save: list[str] = option("modules trained and saved whole; the task head when empty", [])

    def config(self, given: Collection[str] = (), task_column: str | None = None, tasks: int = 0) -> AdaMixConfig:
        """The configuration of these options.

        Args:
            given: names of the options that the user set; a preset has defaults of its own for the others.
            task_column, tasks: the column of each text's task, and how many there are; with it the gates are a table by
                task and weigh the weights (Polytropon), where the user does not say otherwise.

        Raises ValueError: a value of one, or two that exclude each other.
        """
        fields = self._fields()
        if self.preset != NO_PRESET:
            fields = {name: value for name, value in fields.items() if _SPELLED.get(name, name) in given}
        if task_column is not None:
            fields = _by_task(fields, given, task_column, tasks)
        elif self.router == "task":
            raise ValueError(
                "router: got task, expected --task_column too: the column with the name of each text's task"
            )
        if self.preset == "mola" and "num_experts" in given and "experts_pattern" not in given:
            fields["experts_pattern"] = None  # its own would hide the number that is given
        make = AdaMixConfig if self.preset == NO_PRESET else getattr(AdaMixConfig, self.preset)
        made: AdaMixConfig = make(**fields)
        if self.preset != NO_PRESET and made.routing != LEARNED:
            raise ValueError(f"preset: got {self.preset} with --routing {made.routing}, expected one of them")
        if "router" in given and made.routing != LEARNED:
            raise ValueError(f"router: got {self.router} with --routing {made.routing}, expected --routing learned")
        return made

    def _fields(self) -> dict[str, Any]:
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected at least 0 and less than 1")
        saved = names("modules_to_save", self.modules_to_save)
        weight: dict[str, Any] = {}
        if self.consistency_weight is not None:
            weight["consistency_weight"] = self.consistency_weight
        same = (
            "method", "num_experts", "bottleneck", "r", "alpha", "routing", "router", "mix", "balance_weight",
            "z_weight",
        )  # fmt: skip
        layers = {name: names(name, getattr(self, name)) for name in ("target_modules", "exclude_modules")}
        return {
            **{name: getattr(self, name) for name in same},
            **layers,
            "dropout": self.lora_dropout,
            "share": None if self.share.lower() == "none" else self.share,
            "top_k": self.top_k or None,
            "experts_pattern": numbers("experts_pattern", self.experts_pattern),
            "layers_to_transform": numbers("layers_to_transform", self.layers_to_transform),
            "layers_pattern": names("layers_pattern", self.layers_pattern),
            "modules_to_save": [saved] if isinstance(saved, str) else saved,
            **weight,
        }


def _by_task(fields: dict[str, Any], given: Collection[str], column: str, tasks: int) -> dict[str, Any]:
    for name, needed in (("routing", LEARNED), ("router", "task")):
        if name in given and fields[name] != needed:
            raise ValueError(
                f"task_column: got {column!r} with --{name} {fields[name]}, expected --{name} {needed}, or no "
                "--task_column: only a table by task reads it"
            )
    mix = {} if "mix" in given else {"mix": "weights"}
    return {**fields, "routing": LEARNED, "router": "task", "num_tasks": tasks, **mix}


@dataclass
class FitOptions:
    _argument_group_name = "training and evaluation"

    metrics: list[str] = option(
        "accuracy, f1, matthews; pearson, spearman; bleu, nist, meteor, rouge_l, cider, ter, chrf. The first one leads",
        [],
    )
    early_stopping: int = option("end after so many evaluations without a better score; 0 does not", 0)
    head_learning_rate: float = option("of the task head; 0 is --learning_rate", 0.0)
    max_new_tokens: int | None = option("of a generated text (default: 64, or half of a text's where that is less)")
    beams: int = option("of the beam search that generates a text", 4)
    no_baselines: bool = option("do not measure the majority class and the frozen encoder beside the run", False)
    resume: str = option(
        "beside the same command: go on from a checkpoint folder; alone, from the last one in --out; refused where "
        "model, data or settings are others than those it was begun with",
        "",
        nargs="?",
        const=LAST,
    )


def check_amounts(data: DataOptions, fit: FitOptions, arguments: Any) -> None:
    """Raises ValueError, naming the option, for a number that is too small, or not finite."""
    at_least(1, max_tokens=data.max_tokens, max_new_tokens=fit.max_new_tokens, beams=fit.beams)
    at_least(0, max_train_rows=data.max_train_rows, max_eval_rows=data.max_eval_rows)
    at_least(0, early_stopping=fit.early_stopping, head_learning_rate=fit.head_learning_rate)
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least(1, **{name: getattr(arguments, name) for name in positive})
    if not 0 < data.dev_fraction < 1:
        raise ValueError(f"dev_fraction: got {data.dev_fraction}, expected a share between 0 and 1")
    at_least(0, **{name: getattr(arguments, name) for name in ("learning_rate", "adam_epsilon", "weight_decay")})
    if arguments.max_grad_norm != math.inf:  # which clips nothing
        at_least(0, max_grad_norm=arguments.max_grad_norm)
    if arguments.max_steps <= 0 and not 0 < arguments.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs: got {arguments.num_train_epochs:g}, expected more than 0, or --max_steps")


# Of TrainingArguments', what --help shows, in our words.
SHOWN = {
    "output_dir": "folder of the run; also --out",
    "learning_rate": "of the experts (default: by the model's width and the method)",
    "num_train_epochs": "epochs (default: about 600 updates, 4 to 60 epochs)",
    "max_steps": "optimizer steps, in place of epochs (default: none)",
    "per_device_train_batch_size": "texts of a training batch",
    "per_device_eval_batch_size": "texts of an evaluation batch",
    "gradient_accumulation_steps": "batches of an optimizer step",
    "weight_decay": "of AdamW",
    "warmup_steps": "steps of linear warm-up (default: 6 %% of all)",
    "seed": "of the head, the order of the batches and the experts drawn",
    "eval_strategy": "when to evaluate: epoch, steps or no",
    "save_strategy": "when to write a checkpoint: epoch, steps, best or no",
    "save_total_limit": "checkpoints kept",
    "load_best_model_at_end": "keep the checkpoint of the best score, not the last",
    "logging_steps": "steps between two lines of training loss",
    "bf16": "train in bfloat16",
    "gradient_checkpointing": "recompute in backward: less memory, more time",
    "report_to": "tensorboard, wandb, ... or none",
    "use_cpu": "train on the CPU though a GPU is there",
    "disable_tqdm": "no progress bars",
    "log_level": "what goes to stderr",
}
