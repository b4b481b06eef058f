"""Gated calls of one backend inside what a training puts around them: compile, autocast, checkpointing; opcheck."""

import torch
import torch._dynamo
import torch.utils.checkpoint
from plain_gates import gated_adapter_case, gated_lora_case, gradients, leaves_of, run

from adamix_kernels.functional import routed_adapter, routed_lora

OPS = {"lora": (routed_lora, gated_lora_case), "adapter": (routed_adapter, gated_adapter_case)}
FORMS = {"lora": ("dense, token", "chosen, sample"), "adapter": ("dense, sample", "chosen, token")}


def cases(op, backend, device, batch=3):
    """(function of the differentiable tensors alone, these) of either form, both mixes."""
    function, make = OPS[op]
    for form, mix in zip(FORMS[op], ("outputs", "weights"), strict=True):
        args, options = make(form, mix=mix, batch=batch, tokens=5, dtype=torch.float32, device=device)
        yield function, args, {**options, "backend": backend}


def check_compile(op, backend, device):
    """One graph, whatever the batch; the eager call's numbers."""
    for number in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(OPS[op][0], fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (7, 11):  # of no other axis's size
            function, args, options = list(cases(op, backend, device, batch))[number]
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = compiled(*args, **options)
            want = function(*args, **options)
            assert torch.equal(found, want)
            grads = [gradients(out, leaves_of(args, options)) for out in (found, want)]
            torch.testing.assert_close(*grads, rtol=0, atol=0)


def check_autocast(op, backend, device):
    """What 16-bit tensors give, and gradients in their own dtype."""
    for function, args, options in cases(op, backend, device):
        with torch.autocast(device, torch.bfloat16):
            out = function(*args, **options)
        low = [t.detach().bfloat16() if t is not None and t.is_floating_point() else t for t in args]
        added = "base" if op == "lora" else "residual"
        want = function(*low, **{**options, added: options[added].detach().bfloat16()})
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want)
        grads = gradients(out, leaves_of(args, options))
        assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in grads)


def check_checkpointing(op, backend, device):
    """The bits of the call without."""
    for function, args, options in cases(op, backend, device):
        how = {name: value for name, value in options.items() if name != "backend"}

        def layer(*given, backend, inner=function, **named):
            return torch.utils.checkpoint.checkpoint(
                lambda *a: inner(*a, **named, backend=backend), *given, use_reentrant=False
            )

        got, want = (run(f, args, how, backend) for f in (layer, function))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def check_opcheck(op, backend, device):
    """Schema, fake tensors and autograd's registration of the forward's op."""
    for _, args, options in cases(op, backend, device):
        gates, mix = options["gates"], options["mix"]
        if op == "lora":
            how = (1.7, 1, [0], 0.3, mix, backend)
            given = (*args, gates, None, options["base"], torch.tensor(3, device=device), *how)
            torch.library.opcheck(torch.ops.adamix_kernels.gated_lora.default, given)
        else:
            given = (*args, gates, options["residual"], False, "gelu", mix, backend)
            torch.library.opcheck(torch.ops.adamix_kernels.gated_adapter.default, given)
