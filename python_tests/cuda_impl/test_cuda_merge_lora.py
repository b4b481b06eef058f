"""LoRA merged into weights on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda

needs_cuda()

from cuda_probes import captured_graph
from merge_cases import (
    LORA_BANKS,
    check_lora_banks,
    check_lora_lists,
    check_whole_lora_model,
    lora_case,
    lora_layers,
    lora_on,
)

from adamix_kernels.functional import merge_lora
from adamix_kernels.ops.merge.api import merge_loras
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launches

OPS = torch.ops.adamix_cuda


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def check_lora(*sizes, **more):
    tensors, options = lora_case(randn, *sizes, **more)
    assert_in_budget(lora_on("cuda", **options), lora_on("reference", **options), *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize(("groups", "experts", "r"), [(1, 1, 4), (2, 3, 5), (3, 1, 17)])
def test_lora_into_a_weight(groups, experts, r, fan, dtype):
    check_lora(groups, experts, r, fan, dtype)


WHOLE = dict(rows=136, features=72)  # every row fills pieces of 16 bytes


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("groups", "experts", "r"), [(1, 1, 4), (2, 1, 20), (3, 1, 48), (2, 3, 8)])
def test_matrix_units_take_single_experts_of_16_bits(groups, experts, r, dtype, fan, monkeypatch):
    for capability in (90, 75, 70):
        monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
        with launches() as names:
            check_lora(groups, experts, r, fan, dtype, **WHOLE)
        units = experts == 1 and capability >= (75 if dtype == torch.float16 else 80)
        assert names == ["merge_lora_product_kernel" if units else "merge_lora_kernel"]


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("r", [4, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_float32_as_two_numbers_of_bfloat16(dtype, r, fan):
    """The update keeps 16 digits: 2^-16 of its terms, three of them, before the one rounding."""
    (weight, a, b, _), options = lora_case(randn, 2, 1, r, fan, torch.float32, **WHOLE)
    weight = weight.to(dtype)
    out = merge_lora(weight, a, b, backend="cuda", **options)
    exact = merge_lora(weight.double(), a.double(), b.double(), backend="reference", **options)
    terms = merge_lora(weight.double().abs(), a.double().abs(), b.double().abs(), backend="reference", **options)
    digit = torch.finfo(dtype).eps / 2
    assert ((out.double() - exact).abs() <= digit * exact.abs() + 3 * 2**-16 * terms + 2**-24).all()
    assert torch.equal(out, merge_lora(weight, a, b, backend="cuda", **options))


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(("capability", "units"), [(90, True), (75, False)])
def test_what_takes_factors_of_float32(capability, units, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
    for dtype in (torch.float16, torch.bfloat16):
        with launches() as names:
            merge_lora(randn(32, 16, dtype=dtype), randn(4, 16), randn(32, 4), scaling=1.0, backend="cuda")
        assert names == ["merge_lora_product_kernel" if units else "merge_lora_kernel"]


def test_infinities_of_other_factors_stay_where_they_are():
    weight, a, b = randn(40, 16, dtype=torch.bfloat16), randn(4, 16), randn(40, 4)
    a[0, 3], b[7, 1], b[:, 0] = float("inf"), float("nan"), 1.0
    for name in ("cuda", "reference"):
        out = merge_lora(weight, a, b, scaling=1.0, backend=name)
        assert out[:, 3].isposinf().sum() == 39, name
        assert out[7].isnan().all(), name
        assert out[torch.arange(40) != 7][:, torch.arange(16) != 3].isfinite().all(), name


def test_what_fills_no_pieces_is_merged_without_matrix_units():
    for rows, features, r in ((136, 70, 4), (130, 72, 4), (136, 72, 5)):
        for fan in (False, True):
            check_lora(2, 1, r, fan, torch.bfloat16, rows=rows, features=features)
    weight, lora_a, lora_b = (randn(*shape, dtype=torch.float16) for shape in ((16, 24), (4, 24), (16, 4)))
    want = merge_lora(weight, lora_a, lora_b, scaling=2.0, backend="cuda")
    for tensors in ((off(weight), lora_a, lora_b), (weight, off(lora_a), lora_b), (weight, lora_a, off(lora_b))):
        torch.testing.assert_close(merge_lora(*tensors, scaling=2.0, backend="cuda"), want)


def off(t):
    """The same values at an odd address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.sanitize
@pytest.mark.parametrize("fan", [False, True])
def test_memory_of_lora_on_matrix_units(fan):
    check_lora(2, 1, 20, fan, torch.bfloat16, **WHOLE)


@pytest.mark.sanitize
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 8), (torch.bfloat16, 5)])
def test_memory_and_barriers_of_lora(dtype, features, fan):
    check_lora(2, 2, 18, fan, dtype, rows=70, features=features)


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize(
    ("experts", "side", "dtype"), [(1, 50, torch.float32), (3, 50, torch.float32), (1, 56, torch.float16)]
)
def test_what_no_group_touches_keeps_its_bits(experts, side, dtype, fan):
    """Groups that share a tile, one of them of infinities."""
    weight = torch.full((side, side), -0.0, device=DEVICE, dtype=dtype)
    lora_a, lora_b = randn(experts, 8, side, dtype=dtype), randn(experts, 40, 4, dtype=dtype)
    lora_a[0, 4:] = float("inf")
    options = dict(scaling=2.0, groups=2, output_offsets=(5, 27), fan_in_fan_out=fan)
    out = merge_lora(weight, lora_a, lora_b, backend="cuda", **options)
    by_output = out.t() if fan else out
    rest = by_output[[*range(5), 25, 26, *range(47, side)]]
    assert torch.signbit(rest).all()
    assert rest.eq(0).all()
    assert by_output[5:25].isfinite().all()
    assert not by_output[27:47].isfinite().any()
    assert weight.eq(0).all()
    assert torch.signbit(weight).all()


def test_more_groups_than_the_parameters_hold():
    groups = 70
    weight, lora_a, lora_b = randn(2 * groups, 9), randn(groups, 9), randn(2 * groups, 1)
    options = dict(scaling=0.5, groups=groups, output_offsets=tuple(range(0, 2 * groups, 2)))
    got, want = (merge_lora(weight, lora_a, lora_b, backend=name, **options) for name in ("cuda", "reference"))
    torch.testing.assert_close(got, want)


def test_factors_of_another_dtype():
    weight, a, b = randn(33, 20, dtype=torch.bfloat16), randn(4, 20), randn(33, 4)
    exact = weight.double() + 0.5 * b.double() @ a.double()
    got = merge_lora(weight, a, b, scaling=0.5, backend="cuda")
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    weight = weight.float()
    got = merge_lora(weight, a.double(), b.double(), scaling=0.5, backend="cuda")
    assert torch.equal(got, (weight.double() + 0.5 * b.double() @ a.double()).float())


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
def test_lora_layers_that_are_alike_in_one_launch(monkeypatch):
    """Five kinds in a list of seven."""
    assert check_lora_lists("cuda", randn, launches) == ["merge_lora_kernel"] * 5
    names = check_whole_lora_model("cuda", DEVICE, launches)
    assert names == ["merge_banks_kernel", "merge_lora_kernel"]
    with launches() as names:
        merge_loras(lora_layers(randn, torch.bfloat16, torch.bfloat16)[:2], backend="cuda")
    assert names == ["merge_lora_product_kernel"]


@pytest.mark.sanitize
def test_memory_of_more_layers_than_a_launch_holds():
    one = lora_layers(randn, torch.bfloat16)[0]
    layers = [one._replace(weight=randn(24, 16, dtype=torch.bfloat16)) for _ in range(100)]
    got = merge_loras(layers, backend="cuda")
    for out, layer in zip(got[::33], layers[::33], strict=True):
        assert torch.equal(out, merge_lora(**layer._asdict(), backend="cuda"))


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs are the GPU's")
def test_a_graph_replays_lora_layers():
    layers = lora_layers(randn)
    captured, graph = captured_graph(lambda: merge_loras(layers, backend="cuda"))
    for layer in layers:
        layer.weight.copy_(torch.randn_like(layer.weight))
    graph.replay()
    for got, layer in zip(captured, layers, strict=True):
        assert torch.equal(got, merge_lora(**layer._asdict(), backend="cuda"))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("dtype", "factors", "fan", "cases", "multiprocessors"),
    [
        (torch.bfloat16, torch.bfloat16, False, LORA_BANKS[2:], 1),
        (torch.float16, torch.float16, True, LORA_BANKS[1:2], 1),
        (torch.float16, torch.float32, False, LORA_BANKS[:1], 132),
        (torch.bfloat16, torch.float32, True, LORA_BANKS[:1], 1),
    ],
)
def test_banks_are_merged_and_averaged_in_one_launch(dtype, factors, fan, cases, multiprocessors, monkeypatch):
    """On one multiprocessor a block has several tiles, on 132 one. Where B is a bank, too, the means come first."""
    if not ON_HOST:
        check_lora_banks("cuda", randn, dtype, factors, fan)
        return
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", str(multiprocessors))
    names = check_lora_banks("cuda", randn, dtype, factors, fan, cases, launches)
    two = ["merge_banks_kernel", "merge_lora_product_kernel"]
    assert names == [["merge_lora_product_kernel"] if mb == 1 else two for (_, mb), *_ in cases]


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
def test_banks_that_one_launch_does_not_take(monkeypatch):
    """Weights of float32, scores of float64, no matrix units."""
    two = ["merge_banks_kernel", "merge_lora_kernel"]
    assert check_lora_banks("cuda", randn, torch.float32, torch.float32, False, LORA_BANKS[:1], launches) == [two]
    of_double = [(*LORA_BANKS[0][:5], torch.float64)]
    names = check_lora_banks("cuda", randn, torch.bfloat16, torch.bfloat16, True, of_double, launches)
    assert names == [["merge_banks_kernel", "merge_lora_product_kernel"]]
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", "75")
    assert check_lora_banks("cuda", randn, torch.bfloat16, torch.bfloat16, False, LORA_BANKS[:1], launches) == [two]


def test_bad_banks_are_named_by_the_library():
    weight, a, b = (randn(*shape, dtype=torch.float16) for shape in ((16, 8), (2, 4, 8), (1, 16, 4)))

    def call(a_scores):
        OPS.merge_lora_banks_forward([weight] * 2, [a] * 2, [b] * 2, a_scores, 1.0, 1, [0], False)

    for scores, message in (
        ([randn(2)], "a_scores: got 1 of them"),
        ([randn(2), randn(3)], r"a_scores\[1\]: got shape"),
        ([randn(2), randn(2).long()], r"a_scores\[1\]: got Long"),
        ([randn(2), randn(2).half()], r"a_scores\[1\]: got Half, expected Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(scores)
