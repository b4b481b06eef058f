"""The released RoBERTa's clipping of STS-B's predictions."""

from __future__ import annotations

from typing import Any

from torch import nn


def clip_predictions(model: nn.Module, minimum: float = 0.0) -> nn.Module:
    """logits = max(logits, minimum) in evaluation, and returns `model`. Training and the loss see them as they are.

    load_official does this for a RoBERTa with one label (STS-B, whose scores begin at 0). No checkpoint holds it: call
    it again after load_adamix.

    Source: `torch.clip(logits, min=0)` at the end of the reference project's RobertaForSequenceClassification.forward,
    after the losses, where finetuning_task is "stsb". (Its Trainer computes the training loss before it; predictions
    and metrics come after it.) Its BERT has none.
    """
    here = next((hook for hook in model._forward_hooks.values() if isinstance(hook, _Clip)), None)
    if here is None:
        model.register_forward_hook(_Clip(minimum), with_kwargs=True)
    else:
        here.minimum = minimum
    return model


class _Clip:
    """A forward hook; a class, so that the model can be pickled."""

    def __init__(self, minimum: float):
        self.minimum = minimum

    def __call__(self, module: nn.Module, _args: object, kwargs: dict[str, Any], output: Any) -> Any:
        if module.training:
            return output
        if isinstance(output, dict):
            output["logits"] = output["logits"].clamp(min=self.minimum)
            return output
        at = 0 if kwargs.get("labels") is None else 1
        return (*output[:at], output[at].clamp(min=self.minimum), *output[at + 1 :])
