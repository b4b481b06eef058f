"""mixture_lora on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools

import pytest
import torch
from triton_spy import DEVICE, DTYPES, INTERPRET, launches, needs_triton

needs_triton()

from mixture_cases import (
    SHAPES,
    WIDE,
    Mixture,
    check_against_parts,
    check_choice,
    check_compiled_layer,
    check_empty,
    check_in_place,
    check_infinite_expert,
    check_layer,
    check_not_finite,
    check_unused,
    check_wrapped,
)

from adamix_kernels.ops.gated_lora.triton_impl import by_rows, one_tile
from adamix_kernels.ops.mixture_lora import triton_impl
from adamix_kernels.ops.router import triton_impl as router_impl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
spied_launches = functools.partial(launches, triton_impl, router_impl, one_tile, by_rows)


# Every dtype of the common shapes, one in turn of the others.
CASES = [
    (name, dtype)
    for number, name in enumerate(SHAPES)
    for dtype in (DTYPES if name in ("dense", "top 2") else DTYPES[number % 3 :][:1])
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_tile_errs_like_its_parts(name, dtype):
    with spied_launches() as names:
        check_against_parts("triton", SHAPES[name], dtype, DEVICE)
    assert "mixture_lora_forward_kernel" in names
    assert not {"router_kernel", "gated_lora_forward_kernel"} & set(names)


@pytest.mark.parametrize("name", WIDE)
def test_what_no_tile_holds_is_two_ops(name):
    with spied_launches() as names:
        check_against_parts("triton", WIDE[name], torch.float32, DEVICE)
    assert "router_kernel" in names
    assert "mixture_lora_forward_kernel" not in names


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_logits_are_the_routers_ties_too(dtype):
    for shape in SHAPES.values():
        check_choice("triton", shape, dtype, DEVICE)


def test_several_programs_to_a_tile_and_strides():
    """Few rows of many columns: each program writes its own, and what they share alike."""
    shape = (2, 9, 33, 4, 4, 4, 1, 700, 2, 0.3, True)
    check_against_parts("triton", shape, torch.float32, DEVICE)
    case = Mixture(shape, torch.float32, DEVICE)
    want = case.call("triton", *case.tensors)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in case.tensors]
    got = case.call("triton", *strided)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_not_finite():
    check_not_finite("triton", DEVICE)
    check_infinite_expert("triton", DEVICE)


def test_what_is_not_used_or_not_there():
    check_unused("triton", DEVICE)
    with spied_launches() as names:
        check_empty("triton", DEVICE)
    assert "mixture_lora_forward_kernel" not in names


def test_in_place():
    check_in_place("triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_calls_it(dtype, monkeypatch):
    check_layer("triton", monkeypatch, DEVICE, dtype)


@pytest.mark.nightly
@pytest.mark.skipif(not INTERPRET, reason="tracing is the same")
def test_compile_autocast_checkpointing_and_opcheck(monkeypatch):
    check_wrapped("triton", DEVICE)
    check_compiled_layer("triton", monkeypatch, DEVICE)
