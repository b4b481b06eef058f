"""Calls of gated_lora below its public function, drawn as plain_gates.py draws them."""

import torch
from plain_gates import gated_lora_case
from poison import poisoned_memory

# Experts of A and of B; 1 is a bank of one.
BANKS = {"both": (4, 4), "shared A": (1, 4), "shared B": (4, 1), "one": (1, 1)}
SIZES = dict(batch=3, tokens=7, features=21, rank=4, per_group=9, dtype=torch.float32, gates_dtype=torch.float32)


def draw_gates(device, banks="both", kind="chosen", per="token", groups=1, experts=None, scales=True, same=True, **how):
    """([x, A, B, gates, base, dy], dict of the other tensors and options); the last expert is chosen by no one.

    same: one index for both sides; else slot k has two ids.
    """
    of = tuple(experts if experts and m > 1 else m for m in BANKS[banks])
    how = SIZES | dict(groups=groups, scales=scales, device=device, used=max(1, max(of) - 1)) | how
    (x, a, b, i, j), given = gated_lora_case(f"{kind}, {per}", of, **how)
    scale = given["scaling"] if scales else None
    tensors = [t.detach() for t in (x, a, b, given["gates"], given["base"])]
    j = i if same and i is not None and j is not None else j
    dy = torch.randn(tensors[4].shape, generator=torch.Generator().manual_seed(1)).to(tensors[4])
    return [*tensors, dy], dict(indices=(i, j), scales=scale, groups=groups, offsets=list(given["output_offsets"]))


def run_gates(impl, options, mix="outputs", dropout_p=0.0, seed=11, needs=(True, True, True, True), inplace=False):
    """A function of the tensors giving out, dx, dA, dB, dgates of a backend's module; what it allocates is poisoned."""

    def run(x, a, b, gates, base, dy):
        drawn = torch.tensor(seed, device=x.device) if dropout_p else None
        scales = options["scales"]
        if scales is not None and x.dtype == torch.float64:
            scales = scales.double()
        tail = (1.7, options["groups"], options["offsets"], dropout_p, mix)
        given = base.clone() if inplace else base
        with poisoned_memory("reference" not in impl.__name__):
            out, t = impl.forward(x, a, b, *options["indices"], gates, scales, given, drawn, *tail, inplace=inplace)
            grads = impl.backward(dy, x, t, a, b, *options["indices"], gates, scales, drawn, *needs, *tail)
        return out, *grads

    return run
