"""Which loss a Hugging Face model trains with, by task."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto as auto

from ..functional import AdaMixLossOutput, adamix_loss, consistency_loss, linear_adamix_loss

IGNORED = -100
CAUSAL = "causal language modelling"
SEQ2SEQ = "sequence to sequence"
TOKENS = "token prediction"
SEQUENCE = "sequence classification"
REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"

_TASKS: dict[str, tuple[Mapping[str, Any], ...]] = {
    SEQUENCE: (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    # Before TOKENS: transformers lists BART, mBART and MVP as masked language models as well, by the same class.
    SEQ2SEQ: (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ),
    TOKENS: (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    CAUSAL: (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
}
# Models whose logits are lm_head(last hidden state), with nothing in between or after.
_PLAIN_HEADS = ("gpt2", "llama")
# Causal models whose own forward shifts no labels: the logits at s are compared with the labels at s.
_UNSHIFTED = frozenset(
    {f"{decoder}ForCausalLM" for decoder in (
        "Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian", "Mvp", "PLBart",
        "Pegasus", "Speech2Text2", "TrOCR", "Whisper",
    )} | {"XLNetLMHeadModel"}
)  # fmt: skip
# Models whose own loss is none of these: of several tokens ahead, or of several codebooks.
_OWN_LOSS = ("ProphetNet", "XLMProphetNet", "Musicgen")


class Objective:
    """The AdaMix loss of one model: what a label row is, and what is compared between the passes.

    sequence (or image) classification: rows [B], softmax; with problem_type "regression" (or num_labels = 1) the
        Gaussian rule of adamix_loss on float labels; with "multi_label_classification" binary cross-entropy (mean over
        labels) and the Bernoulli symmetric KL summed over labels.
    token classification, masked language models: rows [B, S], those labelled -100 left out.
    causal language models: logits at s predict labels at s + 1. GPT-2 and Llama never hold [2B, S, V] logits. XLNet and
        the decoders of encoder-decoders (BartForCausalLM) compare logits and labels at s, as their own forward does.
    sequence (or speech) to sequence: decoder_input_ids are made from the labels by the model's own rule.

    Args:
        model: a Transformers model (not its DDP wrapper).
        labels: what says problem_type and num_labels; None: the model's configuration.

    Raises NotImplementedError, naming the model's class, for any other task.
    """

    def __init__(self, model: nn.Module, labels: Any = None):
        self.model = model
        self.labels = getattr(model, "config", None) if labels is None else labels
        self.task = _task_of(model)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """One entry for each term of the mean that the cross-entropy is; -100 where the term is left out."""
        if self.task == CAUSAL:
            return labels[..., 1:]
        if self.task == SEQUENCE and self._problem(labels) in (REGRESSION, MULTI_LABEL):
            return torch.zeros_like(labels, dtype=torch.int64)
        return labels

    def prepare(self, inputs: dict[str, Any], labels: torch.Tensor) -> dict[str, Any]:
        """Inputs (not doubled) for a forward without labels and without a cache."""
        inputs = dict(inputs)
        if self.task == SEQ2SEQ and "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            shift = _decoder_rule(self.model)
            assert shift is not None  # _task_of() asked
            inputs["decoder_input_ids"] = shift(labels)
        if "use_cache" in inspect.signature(type(self.model).forward).parameters:
            inputs["use_cache"] = False
        return inputs

    @torch.no_grad()
    def before_compile(self) -> None:
        """One forward of one token, after which loss() breaks no graph: transformers installs, under a lock, what
        collects hidden states on the first forward that asks for them."""
        if self.task != CAUSAL or self.plain_head() is None:
            return
        device = cast("torch.device", self.model.device)
        mode, ids = self.model.training, torch.zeros(1, 1, dtype=torch.long, device=device)
        options = {"attention_mask": torch.ones_like(ids), "logits_to_keep": 1, "output_hidden_states": True}
        self.model.eval()(input_ids=ids, use_cache=False, **options)
        self.model.train(mode)

    def loss(
        self,
        network: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        *,
        doubled: bool,
        weight: float,
        label_smoothing: float = 0.0,
        num_items: int | torch.Tensor | None = None,
        fuse_head: bool = True,
        expected_grad: float | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> tuple[AdaMixLossOutput, Any]:
        """One forward of `network` (the model or its DDP wrapper), and the loss.

        Args:
            inputs: of prepare(), doubled if `doubled`. labels: [B, ...], never doubled.
            num_items: replaces the number of terms of the mean, as counted over targets().
            fuse_head: a language model may go without its logits. autocast: the context for that head.
            expected_grad: the gradient that will come in to the loss, as adamix_loss takes it.

        Returns (losses, the model's outputs).

        Raises ValueError for label smoothing of what are no single classes.
        """
        if label_smoothing and self.task == SEQUENCE and (kind := self._problem(labels)) in (REGRESSION, MULTI_LABEL):
            raise ValueError(f"label_smoothing: got {label_smoothing}, expected 0 with problem_type {kind!r}")
        options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "num_items": num_items}
        if doubled and fuse_head and self.task == CAUSAL and (head := self.plain_head()) is not None:
            outputs = network(**inputs, logits_to_keep=1, output_hidden_states=True, return_dict=True)
            hidden = outputs.hidden_states[-1]
            with autocast():
                result = linear_adamix_loss(hidden[:, :-1], head.weight, labels[:, 1:], bias=head.bias, **options)
            return result, outputs
        outputs = network(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        problem = self._problem(labels) if self.task == SEQUENCE else None
        if self.task == CAUSAL:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if problem == MULTI_LABEL:
            return _multi_label(logits, labels, doubled, weight, num_items), outputs
        if problem == REGRESSION:
            labels = labels.to(torch.float32).view(labels.shape[0], *logits.shape[1:])
        elif problem is not None:
            labels = labels.reshape(-1)  # [B, 1], as transformers takes them
        if not doubled:
            return _single_pass(logits, labels, label_smoothing, num_items), outputs
        return adamix_loss(logits, labels, expected_grad=expected_grad, **options), outputs

    def _problem(self, labels: torch.Tensor) -> str:
        """problem_type, by transformers' own rule where the configuration leaves it open."""
        config: Any = self.labels
        if config.problem_type is not None:
            return str(config.problem_type)
        if config.num_labels == 1:
            return REGRESSION
        return MULTI_LABEL if labels.is_floating_point() else "single_label_classification"

    def plain_head(self) -> nn.Linear | None:
        """The layer whose product with the last hidden state is all there is to the logits."""
        owner: Any = self.model
        if owner.config.model_type not in _PLAIN_HEADS:
            return None
        head = owner.get_output_embeddings()
        return head if type(head) is nn.Linear else None


def is_unshifted(model: nn.Module) -> bool:
    """Whether the model wants the labels of causal language modelling shifted already: at s the token at s + 1."""
    return any(c.__name__ in _UNSHIFTED for c in type(model).__mro__)


def _task_of(model: nn.Module) -> str:
    names = {c.__name__ for c in type(model).__mro__}
    task = next((t for t, tables in _TASKS.items() if any(names & _classes(table) for table in tables)), None)
    if task == CAUSAL and is_unshifted(model):
        task = TOKENS
    own = task in (CAUSAL, SEQ2SEQ) and any(name.startswith(_OWN_LOSS) for name in names)
    if task is None or own or (task == SEQ2SEQ and _decoder_rule(model) is None):
        raise NotImplementedError(
            f"model: got {type(model).__name__}, expected a model for sequence, image or token classification, "
            "or for masked, causal or sequence-to-sequence language modelling; AdaMixTrainer has no loss for its task"
        )
    if getattr(model.config, "output_router_logits", False):
        raise NotImplementedError(
            f"model: got {type(model).__name__} with output_router_logits, whose auxiliary loss AdaMixTrainer lacks"
        )
    return task


def _classes(table: Mapping[str, Any]) -> set[str]:
    """Names of the classes of a table, where some kinds of model have several. Those with a teacher take no labels."""
    found = {c for entry in table.values() for c in ((entry,) if isinstance(entry, str) else entry)}
    return {name for name in found if not name.endswith("WithTeacher")}


def _decoder_rule(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """labels -> decoder_input_ids: the model's method, or the function of its file (Whisper); None without either."""
    owner: Any = model
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return lambda labels: owner.prepare_decoder_input_ids_from_labels(labels=labels)
    for kind in type(model).__mro__:
        shift = getattr(sys.modules.get(kind.__module__), "shift_tokens_right", None)
        if shift is not None:
            config = owner.config
            return lambda labels: shift(labels, config.pad_token_id, config.decoder_start_token_id)
    return None


def _single_pass(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float, num_items: Any
) -> AdaMixLossOutput:
    """Cross-entropy (squared error for float labels) alone, in float32."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if labels.is_floating_point():
        total = F.mse_loss(logits, labels.to(logits.dtype), reduction="sum")
        count: torch.Tensor | int = labels.numel()
    else:
        total = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten().long(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        count = (labels != IGNORED).sum().clamp(min=1)
    if num_items is not None:  # 0 where the whole update is unlabelled: a loss of 0, as with both passes
        count = num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(1, num_items)
    loss = total / count
    return AdaMixLossOutput(loss, loss.detach(), torch.zeros_like(loss.detach()))


def _multi_label(
    logits: torch.Tensor, labels: torch.Tensor, doubled: bool, weight: float, num_items: Any
) -> AdaMixLossOutput:
    """Binary cross-entropy, mean over labels; symmetric KL of Bernoullis, sigmoid(z) = softmax([z, 0])[0], summed."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    batch, classes = labels.shape
    count = labels.numel() if num_items is None else num_items
    cross_entropy = F.binary_cross_entropy_with_logits(logits[:batch], labels.to(logits.dtype), reduction="sum") / count
    if not doubled:
        return AdaMixLossOutput(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy.detach()))
    two = torch.stack([logits, torch.zeros_like(logits)], -1)
    consistency = consistency_loss(two[:batch], two[batch:], reduction="sum") * (classes / count)
    return AdaMixLossOutput(cross_entropy + weight * consistency, cross_entropy.detach(), consistency.detach())
