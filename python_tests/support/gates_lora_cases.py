"""Calls of gated_lora below its public function, and what is drawn for them."""

import torch
from poison import poisoned_memory

# Experts of A and of B; 1 is a bank of one.
BANKS = {"both": (4, 4), "shared A": (1, 4), "shared B": (4, 1), "one": (1, 1)}


def draw_gates(
    device, banks="both", kind="chosen", per="token", groups=1, batch=3, tokens=7, features=21, rank=4, per_group=9,
    slots=2, experts=None, dtype=torch.float32, gates_dtype=None, index_dtype=torch.int64, scales=True, same=True,
    seed=0,
):  # fmt: skip
    """([x, A, B, gates, base, dy], dict of the other tensors and options); the last expert is chosen by no one.

    same: one index for both sides; else slot k has two ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of).to(device)

    of_a, of_b = (experts if experts and m > 1 else m for m in BANKS[banks])
    m, lead = max(of_a, of_b), (batch,) if per == "sample" else (batch, tokens)
    offsets = [0] if groups == 1 else [2 * g * per_group for g in range(groups)]
    width = max(offsets) + per_group + (1 if groups > 1 else 0)
    draw = lambda: torch.randint(max(1, m - 1), (*lead, slots), generator=generator).to(device, index_dtype)  # noqa: E731
    indices = (None, None)
    if kind == "chosen":
        index = draw()
        indices = (index if of_a > 1 else None, (index if same else draw()) if of_b > 1 else None)
    gates = randn(*lead, m if kind == "dense" else slots, of=gates_dtype or torch.float32)
    tensors = [
        randn(batch, tokens, features), randn(of_a, groups * rank, features), randn(of_b, groups * per_group, rank),
        gates, randn(batch, tokens, width), randn(batch, tokens, width),
    ]  # fmt: skip
    scale = torch.rand(m, generator=generator).to(device) + 0.5 if scales else None
    return tensors, dict(indices=indices, scales=scale, groups=groups, offsets=offsets)


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
