"""What the C++ entries of the routed ops refuse: the message names the argument, and nothing is written."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from adapter_cases import draw_adapter, run_adapter
from cuda_probes import spread
from plain_lora import draw_lora

from adamix_kernels.functional import routed_lora


def adapter_arguments(direction):
    """The C++ op's arguments by name, all right."""
    (x, down_weight, down_bias, up_weight, up_bias, dy), (down, up) = draw_adapter(
        DEVICE, torch.float32, 2, 3, 20, 4, 3, 2, "sample", "token"
    )
    weights = dict(x=x, down_weight=down_weight, up_weight=up_weight, down_index=down, up_index=up)
    options = dict(add_input=False, activation="gelu")
    if direction == "forward":
        return dict(**weights, down_bias=down_bias, up_bias=up_bias, residual=torch.zeros_like(dy), **options)
    needs = dict(need_input=True, need_down=True, need_up=True)
    return dict(grad_out=dy, pre=x.new_zeros(2, 3, 4), **weights, **needs, **options)


def lora_arguments(direction):
    """The C++ op's arguments by name, all right."""
    (x, a, b, base, dy), options = draw_lora(
        DEVICE, "sample", "token", 2, batch=2, tokens=3, features=20, dtype=torch.float32
    )
    common = dict(x=x, lora_a=a, lora_b=b, a_index=options["a_index"], b_index=options["b_index"])
    common |= dict(seed=torch.tensor(3, device=DEVICE), scaling=1.7, groups=2, offsets=[0, 6], dropout_p=0.3)
    if direction == "backward":
        return dict(**common, grad_out=dy, t=x.new_zeros(2, 3, 4), need_x=True, need_a=True, need_b=True)
    return dict(**common, base=base)


def refuse(op, arguments, changed, message):
    op(**arguments)
    arguments |= {name: change(arguments[name]) for name, change in changed.items()}
    written = arguments.get("base")
    before = None if written is None else written.clone()
    with pytest.raises(RuntimeError, match="^" + message):
        op(**arguments)
    assert written is None or torch.equal(written, before)


# Hout = 7, H = 20
NARROWER = dict(add_input=lambda _: True, up_weight=lambda w: w[:, :7], up_bias=lambda _: None)


@pytest.mark.parametrize(
    ("direction", "changed", "message"),
    [
        ("forward", dict(x=lambda x: x.int()), "x: got Int, expected Float, Half or BFloat16"),
        ("forward", dict(x=lambda x: x[0]), r"x: got shape \(3, 20\), expected \[B, S, H\]"),
        ("forward", dict(down_weight=lambda w: w[..., 1:]), r"down_weight: got shape \(3, 4, 19\)"),
        ("forward", dict(down_weight=lambda w: w.double()), "down_weight: got Double, expected Float, as x"),
        ("forward", dict(up_weight=lambda w: w[..., 1:]), r"up_weight: got shape \(2, 20, 3\)"),
        ("forward", dict(down_bias=lambda b: b[1:]), r"down_bias: got shape \(2, 4\)"),
        ("forward", dict(up_bias=lambda b: b.half()), "up_bias: got Half, expected Float"),
        ("forward", dict(residual=lambda r: r[:1]), r"residual: got shape \(1, 3, 20\)"),
        (
            "forward",
            NARROWER,
            "x as the residual: got shape",
        ),
        ("forward", dict(down_index=lambda _: None), "down_index: got none, expected an index, as the bank holds 3"),
        ("forward", dict(up_index=lambda i: i.float()), "up_index: got Float, expected Int or Long"),
        ("forward", dict(down_index=lambda i: i[:1]), r"down_index: got shape \(1,\), expected \[B\]"),
        ("forward", dict(up_index=lambda i: i.t()), r"up_index: got shape \(3, 2\), expected \[B\] or \[B, S\]"),
        ("forward", dict(activation=lambda _: "tanh"), "activation: got 'tanh', expected 'gelu'"),
        ("forward", dict(up_weight=lambda w: w.to("meta")), "up_weight: got another device"),
        ("forward", dict(down_index=lambda i: i.to("meta")), "down_index: got another device"),
        ("backward", dict(x=lambda x: x.double()), "x: got Double"),
        ("backward", dict(down_weight=lambda w: w[0]), r"down_weight: got shape \(4, 20\)"),
        ("backward", dict(up_weight=lambda w: w.half()), "up_weight: got Half"),
        ("backward", dict(grad_out=lambda g: g[:, :1]), r"grad_out: got shape \(2, 1, 20\)"),
        ("backward", dict(pre=lambda p: p[..., 1:]), r"pre: got shape \(2, 3, 3\)"),
        ("backward", dict(up_index=lambda _: None), "up_index: got none"),
        ("backward", dict(activation=lambda _: "tanh"), "activation: got 'tanh'"),
    ],
)
def test_wrong_arguments_of_the_adapter(direction, changed, message):
    refuse(
        getattr(torch.ops.adamix_cuda, f"routed_adapter_{direction}"), adapter_arguments(direction), changed, message
    )


@pytest.mark.parametrize(
    ("direction", "changed", "message"),
    [
        ("forward", dict(x=lambda x: x.double()), "x: got Double, expected Float, Half or BFloat16"),
        ("forward", dict(x=lambda x: x[0]), r"x: got shape \(3, 20\), expected \[B, S, K\]"),
        ("forward", dict(lora_a=lambda a: a[..., 1:]), r"lora_a: got shape \(4, 4, 19\)"),
        ("forward", dict(lora_a=lambda a: a.half()), "lora_a: got Half, expected Float, as x"),
        ("forward", dict(lora_a=lambda a: a[:, 1:]), r"lora_a: got shape \(4, 3, 20\), expected rows that 2 groups"),
        ("forward", dict(lora_b=lambda b: b[..., 1:]), r"lora_b: got shape \(4, 6, 1\)"),
        ("forward", dict(lora_b=lambda b: b[:, 1:]), r"lora_b: got shape \(4, 5, 2\), expected rows that 2 groups"),
        ("forward", dict(lora_b=lambda b: b.to("meta")), "lora_b: got another device"),
        ("forward", dict(base=lambda b: b[:, 1:]), r"base: got shape \(2, 2, 10\), expected \[B, S, N\]"),
        ("forward", dict(base=lambda b: b.bfloat16()), "base: got BFloat16, expected Float"),
        ("forward", dict(base=lambda b: b[..., :8]), r"offsets: got \(0, 6\), expected ranges within 8 columns"),
        ("forward", dict(groups=lambda _: 0), "groups: got 0, expected 1 to 64 groups"),
        ("forward", dict(groups=lambda _: 65), "groups: got 65"),
        ("forward", dict(offsets=lambda _: [0]), r"offsets: got \(0\), expected 2 of them"),
        ("forward", dict(offsets=lambda _: [0, 2]), r"offsets: got \(0, 2\), expected ranges of Ng = 3 that do not"),
        ("forward", dict(offsets=lambda _: [-1, 6]), r"offsets: got \(-1, 6\), expected offsets of at least 0"),
        ("forward", dict(offsets=lambda _: [0, 2**40]), "offsets: got 1099511627776, expected a size below"),
        ("forward", dict(a_index=lambda _: None), "a_index: got none, expected an index, as the bank holds 4"),
        ("forward", dict(b_index=lambda i: i[:1]), r"b_index: got shape \(1, 3\)"),
        ("forward", dict(b_index=lambda i: i.float()), "b_index: got Float, expected Int or Long"),
        ("forward", dict(seed=lambda _: None), "seed: got none, expected a seed, as dropout_p is 0.3"),
        ("forward", dict(seed=lambda s: s.int()), "seed: got Int, expected Long"),
        ("forward", dict(seed=lambda s: s.view(1)), r"seed: got shape \(1,\)"),
        ("forward", dict(seed=lambda s: s.to("meta")), "seed: got another device"),
        ("forward", dict(dropout_p=lambda _: 1.0), "dropout_p: got 1.0"),
        ("forward_", dict(base=lambda b: spread(b)), "base: got a tensor that is not contiguous"),
        ("forward_", dict(lora_a=lambda a: a.half()), "lora_a: got Half"),
        ("backward", dict(grad_out=lambda g: g[:, 1:]), r"grad_out: got shape \(2, 2, 10\)"),
        ("backward", dict(grad_out=lambda g: g[..., :7]), "offsets: got"),
        ("backward", dict(t=lambda t: t[..., 1:]), r"t: got shape \(2, 3, 3\)"),
        ("backward", dict(t=lambda t: t.half()), "t: got Half"),
        ("backward", dict(b_index=lambda _: None), "b_index: got none"),
    ],
)
def test_wrong_arguments_of_lora(direction, changed, message):
    refuse(getattr(torch.ops.adamix_cuda, f"routed_lora_{direction}"), lora_arguments(direction), changed, message)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("routed_adapter_forward", adapter_arguments("forward")),
        ("routed_adapter_backward", adapter_arguments("backward")),
        ("routed_lora_forward", lora_arguments("forward")),
        ("routed_lora_forward_", lora_arguments("forward_")),
        ("routed_lora_backward", lora_arguments("backward")),
    ],
)
def test_tensors_elsewhere_are_refused(op, arguments):
    there = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match="x: got a tensor that is not on"):
        getattr(torch.ops.adamix_cuda, op)(**there)


def test_a_rank_beyond_shared_memory_is_refused_with_the_sizes():
    tensors, indices = draw_adapter(DEVICE, torch.float32, 1, 2, 4, 2000, 1, 1, None, None)
    with pytest.raises(RuntimeError, match=r"routed_adapter: r, in units of 16: got 2000, expected at most \d+ on"):
        run_adapter("cuda", tensors, indices)(*tensors)


def test_a_refused_launch_leaves_the_base_as_it_was():
    (x, a, b, base, _), options = draw_lora(DEVICE, batch=1, tokens=2, rank=2000, dtype=torch.float32)
    before = base.clone()
    with pytest.raises(RuntimeError, match=r"routed_lora: r, in units of 16: got 2000, expected at most \d+ on"):
        routed_lora(x, a, b, base=base, **options, inplace=True, backend="cuda")
    assert torch.equal(base, before)
