"""What AdaMixTrainer looks for in a model before it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .gate_training import OPTIONS
from .state import adamix_state
from .targets import is_gathered

# Where the texts of one long row begin, as flash attention is told.
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"})


def check_unpacked(model: nn.Module, inputs: Mapping[str, Any], doubled: bool) -> None:
    """Raises ValueError for several texts in one row, where they would not stay apart."""
    packed = sorted(set(inputs) & _PACKED)
    places = inputs.get("position_ids")
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if doubled and flash and not packed and places is not None and "attention_mask" not in inputs:
        # transformers looks for texts in the positions of a single row alone, and two passes are two rows.
        packed = ["position_ids that begin anew"] if bool((places.diff(dim=-1) < 0).any()) else []
    if packed:
        raise ValueError(
            f"inputs: got {', '.join(packed)}, a packed batch, whose boundaries cannot be doubled, expected one "
            "text a row: packing=False and padding_free=False"
        )


def check_layout(model: nn.Module) -> None:
    """Raises ValueError for experts drawn per pass or sample in layers that are given tokens of all samples, mixed."""
    state = adamix_state(model)
    # With one pass a whole batch has one expert, however it lies.
    drawn = ("batch", "sample") if state.config.passes == 2 else ("sample",)
    if state.config.num_experts == 1 or state.config.routing not in drawn:
        return
    path = next((path for path in state.paths if is_gathered(path)), None)
    if path is not None:
        raise ValueError(
            f"routing: got {state.config.routing!r} for {path!r}, which is given the tokens that chose it, of all "
            "samples, expected 'token', 'batch' with consistency_weight=0, num_experts=1 or other target_modules"
        )


def check_checkpointing(model: nn.Module, args: Any, fsdp_plugin: Any = None) -> None:
    """Raises ValueError for activation checkpointing that would not redraw the same experts in backward."""
    options: dict[str, Any] = next((getattr(args, n) for n in OPTIONS if getattr(args, n, None)), {})
    # The functions that recompute: transformers' own, and that of torch's CheckpointWrapper.
    functions = (
        getattr(m, n, None) for m in model.modules() for n in ("_gradient_checkpointing_func", "checkpoint_fn")
    )
    if options.get("preserve_rng_state") is False:
        where = "args.gradient_checkpointing_kwargs"
    elif any(getattr(f, "keywords", {}).get("preserve_rng_state") is False for f in functions):
        where = "model's activation checkpointing"
    elif getattr(fsdp_plugin, "activation_checkpointing", False):
        where = "args.fsdp_config['activation_checkpointing'] (use args.gradient_checkpointing)"
    else:
        return
    raise ValueError(
        f"{where}: got preserve_rng_state=False, expected True: the recomputation in backward would draw other "
        "experts, and the gradients would be silently wrong"
    )


def unsaved_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters that save_adamix does not write."""
    state = adamix_state(model)
    routed = [p for path in state.paths for p in _without_base(model.get_submodule(path))]
    whole = [p for path in state.saved for p in model.get_submodule(path).parameters()]
    written = {id(p) for p in (*routed, *whole)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in written]


def _without_base(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if not name.startswith("base.")]
