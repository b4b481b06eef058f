"""Random calls of the frozen linear layer with its routed LoRA, Triton's alone, forward and input gradient."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.ops._dropout import keep_mask

from ..numerics import plain
from .case import Case
from .draws import Draw, Sizes
from .loras import offsets_of

# No infinities: a product with a masked zero is NaN in the whole tile, and nobody promises otherwise here.
_VALUES = ("normal", "normal", "zeros", "tiny", "one huge")


@st.composite
def frozen_cases(draw, dtypes, sizes: Sizes) -> Case:
    from adamix_kernels.ops.routed_lora.triton_impl.frozen_linear import frozen_linear_lora, frozen_linear_lora_dx

    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens)
    features, r = d.integer(1, sizes.features), d.integer(1, sizes.rank)
    ma, mb, groups, per_group = d.integer(1, 4), d.integer(1, 4), d.choose((1, 2)), d.integer(1, sizes.features)
    offsets, width = offsets_of(d, groups, per_group)
    dropout_p, seed = d.choose((0.0, 0.3)), torch.tensor(d.choose((0, -1, 11)))
    tensors = tuple(
        d.tensor(name, *shape, values=_VALUES)
        for name, shape in (
            ("x", (batch, tokens, features)), ("weight", (width, features)), ("bias", (width,)),
            ("lora_a", (ma, groups * r, features)), ("lora_b", (mb, groups * per_group, r)),
            ("grad_out", (batch, tokens, width)),
        )
    )  # fmt: skip
    i, j = d.index("a_index", ma, batch, tokens), d.index("b_index", mb, batch, tokens)
    d.said.append(f"groups {groups}, offsets {offsets}, dropout {dropout_p}")
    keep = None
    if dropout_p:
        keep = keep_mask(seed, batch * tokens, features, dropout_p).view(batch, tokens, features)
    # An index of one expert is the op's to leave out.
    indices = tuple(None if m == 1 else index for m, index in ((ma, i), (mb, j)))

    def op(_backend, x, weight, bias, lora_a, lora_b, grad_out):
        options = dict(offsets=offsets, seed=seed if dropout_p else None, dropout_p=dropout_p)
        out, _ = frozen_linear_lora(x, weight, bias.contiguous(), lora_a, lora_b, *indices, 1.7, **options)
        dx, _ = frozen_linear_lora_dx(grad_out, weight, lora_a, lora_b, *indices, 1.7, **options)
        return out, dx

    def definition(x, weight, bias, lora_a, lora_b, grad_out):
        leaf = x.detach().requires_grad_()
        base = torch.nn.functional.linear(leaf, weight, bias)
        out = plain.lora(leaf, lora_a, lora_b, base, i, j, 1.7, groups, offsets, keep, dropout_p)
        return out.detach(), torch.autograd.grad(out, leaf, grad_out)[0]

    integers = tuple(t for t in (i, j) if t is not None)
    return Case("frozen_linear_lora", tensors, op, definition, None, d.said, integers=integers)
