"""The fuzzing of the reference in its small size, and that each of its checks can fail."""

from unittest import mock

import pytest
import torch

from adamix_kernels import RoutedAdapter
from adamix_kernels.models import checkpoint, inject
from adamix_kernels.models import merging as model_merging
from adamix_kernels.modules import adapter as adapter_module
from adamix_kernels.ops.consistency import reference as losses
from adamix_kernels.ops.merge import reference as merging
from adamix_kernels.ops.routed_adapter import reference as adapters
from adamix_kernels.routing import Router
from reliability import fuzz_reference
from reliability.fuzz import models, modules
from reliability.fuzz.adapters import routed_adapter_cases, unused_experts
from reliability.fuzz.case import check
from reliability.fuzz.draws import ALL_FLOATS, Sizes
from reliability.fuzz.run import run_cases

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_public_function_holds():
    figures = list(fuzz_reference.run("small"))
    assert len(figures) == len(fuzz_reference.OPS) + len(fuzz_reference.PLAIN)
    assert [figure.value for figure in figures if not figure.passed] == []


def _found(name, module, function, spoil):
    """What the fuzz says of an op whose backend's `function` gives results that `spoil` has changed."""
    real = getattr(module, function)
    with mock.patch.object(module, function, lambda *args: spoil(*real(*args), args=args)):
        cases = fuzz_reference.OPS[name](ALL_FLOATS, Sizes())
        return run_cases(name, cases, lambda case: check(case, "reference"), 200, True).failure


def test_a_wrong_value_is_found():
    failure = _found("routed_adapter", adapters, "forward", lambda out, pre, args: (out * 1.01, pre))
    assert "budget" in failure


def test_a_gradient_for_an_unused_expert_is_found():
    def spoil(dx, down_weight, *others, args):
        rows = args[1].shape[0] * args[1].shape[1]
        down_weight[unused_experts(args[5], len(down_weight), rows)] += 1e-3
        return dx, down_weight, *others

    assert "expert without rows" in _found("routed_adapter", adapters, "backward", spoil)


def test_other_bits_the_second_time_are_found():
    drift = iter(range(10**9))

    def spoil(out, pre, args):
        return out + next(drift) * 1e-3, pre

    assert "other bits" in _found("routed_adapter", adapters, "forward", spoil)


def test_a_written_input_is_found():
    def spoil(out, pre, args):
        args[0].detach().view(-1)[:1].add_(1)
        return out, pre

    assert "was written" in _found("routed_adapter", adapters, "forward", spoil)


def test_memory_that_nobody_wrote_is_found():
    def spoil(loss, stats, scale, args):
        return torch.empty_like(loss), stats, scale

    assert _found("consistency_loss", losses, "forward", spoil)


def test_a_wrong_merge_is_found():
    real = merging.experts_forward
    with mock.patch.object(merging, "experts_forward", lambda bank, scores: real(bank, None)):
        cases = fuzz_reference.OPS["merge_experts"](ALL_FLOATS, Sizes())
        assert "budget" in run_cases("", cases, lambda case: check(case, "reference"), 200, True).failure


def test_a_router_beyond_its_bank_is_found():
    real = Router._randint
    with mock.patch.object(Router, "_randint", lambda self, experts, *rest: real(self, experts + 1, *rest)):
        strategy, held = fuzz_reference.PLAIN["Router.draw"]
        assert run_cases("", strategy(), held, 200, True).failure is not None


def _found_in(strategy, check):
    return run_cases("", strategy(), check, 400, True).failure


def test_a_module_off_its_definition_is_found(monkeypatch):
    real = modules.RoutedLoRALinear.forward
    monkeypatch.setattr(modules.RoutedLoRALinear, "forward", lambda self, x: real(self, x) * 1.01)
    assert "RoutedLoRALinear" in _found_in(modules.layers, modules.check_layer)


def test_an_expert_other_than_the_drawn_one_is_found(monkeypatch):
    real = adapter_module.routed_by_pass

    def wrong(x, wd, bd, wu, bu, down_index, *rest):
        return real(x, wd, bd, wu, bu, None if down_index is None else down_index * 0, *rest)

    monkeypatch.setattr(adapter_module, "routed_by_pass", wrong)
    assert "RoutedAdapter" in _found_in(modules.layers, modules.check_layer)


def _fresh_adapters(adapters):
    return [RoutedAdapter(a.hidden_size, a.bottleneck, 1, None, a.activation, router=a.router) for a in adapters]


@pytest.mark.parametrize(
    ("place", "name", "wrong", "said"),
    [
        (model_merging, "merge_adapters", _fresh_adapters, "merged"),
        (checkpoint, "put", lambda target, value: None, "after loading"),
        (Router, "uses_merged", lambda self, training, learning: True, "alone computes"),
        (inject, "install_guards", lambda model: model.requires_grad_(True), "requires_grad"),
    ],
)
def test_a_model_that_is_not_what_it_should_be_is_found(monkeypatch, place, name, wrong, said):
    monkeypatch.setattr(place, name, wrong)
    assert said in _found_in(models.adaptations, models.check_adaptation)


def test_exactly_so_many_cases_run():
    ran = []
    outcome = run_cases("", routed_adapter_cases(ALL_FLOATS, Sizes()), ran.append, 37, True)
    assert (outcome.ended, len(ran), outcome.failure) == (37, 37, None)
