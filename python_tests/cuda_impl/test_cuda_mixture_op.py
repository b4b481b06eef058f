"""mixture_lora through backend="cuda": what test_mixture_lora.py asks of the reference."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda

needs_cuda()

from mixture_cases import (
    SHAPES,
    WIDE,
    Mixture,
    check_against_parts,
    check_choice,
    check_empty,
    check_in_place,
    check_infinite_expert,
    check_layer,
    check_not_finite,
    check_unused,
    check_wrapped,
)

from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

ALL = SHAPES | WIDE
# Of 16-byte pieces in 16 bits.
PIECES = {
    "dense": (2, 19, 64, 8, 8, 8, 1, 48, None, 0.3, True),
    "top 2, groups": (3, 7, 40, 4, 4, 8, 2, 16, 2, 0.3, False),
    "one A, nine experts": (2, 17, 72, 1, 9, 16, 1, 24, 3, 0.0, True),
    "one B": (2, 17, 64, 6, 1, 8, 1, 64, None, 0.0, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_errs_like_its_parts(name, dtype):
    check_against_parts("cuda", ALL[name], dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", PIECES)
def test_errs_like_its_parts_in_one_launch(name, dtype):
    case = Mixture(PIECES[name], dtype, DEVICE)
    case.offsets = [2 * g * (case.b.shape[1] // case.groups) for g in range(case.groups)]
    shape = *case.x.shape[:2], case.offsets[-1] + case.b.shape[1] // case.groups + 8
    case.base, case.grads[0] = torch.randn(shape).to(DEVICE, dtype), torch.randn(shape).to(DEVICE)
    with launch_names() as made:
        got = case.results(lambda *t: case.call("cuda", *t), *case.tensors)
    if ON_HOST:
        assert [launch for launch in made if "forward" in launch] == ["mixture_forward_mma"]
    index = case.call("cuda", *case.tensors).indices
    assert_in_budget(
        lambda *_: got, lambda *t: case.results(lambda *a: case.definition("reference", index, *a), *t), *case.tensors,
        multiple=8.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_logits_are_the_routers_ties_too(dtype):
    for shape in (ALL | PIECES).values():
        check_choice("cuda", shape, dtype, DEVICE)


def test_what_is_not_finite_or_not_used_or_not_there():
    check_not_finite("cuda", DEVICE)
    check_infinite_expert("cuda", DEVICE)
    check_unused("cuda", DEVICE)
    check_empty("cuda", DEVICE)


def test_in_place():
    check_in_place("cuda", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer(dtype, monkeypatch):
    check_layer("cuda", monkeypatch, DEVICE, dtype)


def test_compile_autocast_checkpointing_and_opcheck():
    torch._dynamo.reset()
    check_wrapped("cuda", DEVICE)
