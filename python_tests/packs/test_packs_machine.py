"""Random calls of add, replace, remove, predict, save and load against plain separate adapters."""

import pytest
import tiny_packs as tp
import torch
from suite_size import NIGHTLY
from torch import nn

from adamix_kernels import (
    AdaMixConfig,
    adapt,
    add_expert,
    load_adamix,
    load_pack,
    merge,
    pack,
    remove_expert,
    replace_expert,
    save_adamix,
    save_pack,
    use_experts,
)

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

WIDE, ROWS, CAPACITY = 12, 7, 4
RUNS = 20 if NIGHTLY else 3  # of 50 calls each: a thousand
NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])


class Small(nn.Module):
    def __init__(self, labels=2):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.classifier = nn.Linear(WIDE, labels)

    def forward(self, x):
        return self.classifier(self.second(torch.tanh(self.first(x))))


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """(folder, labels, what it computes alone) of twelve adaptations of other methods, ranks and labels."""
    root = tmp_path_factory.mktemp("machine")
    x = torch.randn(ROWS, 1, WIDE, generator=torch.Generator().manual_seed(1))
    made = []
    for n in range(12):
        labels = 2 + n % 3
        place = (
            {"method": "adapter", "target_modules": ["second"]}
            if n % 2
            else {"method": "lora", "target_modules": ["first"]}
        )
        config = AdaMixConfig(num_experts=2, bottleneck=1 + n % 5, r=1 + n % 4, alpha=float(1 + n), **place)
        model = tp.randomise(adapt(Small(labels), config), n)
        folder = save_adamix(merge(model) if n % 4 < 2 else model, root / str(n))
        with torch.no_grad():
            made.append((folder, labels, load_adamix(Small(labels), folder).eval()(x)[:, 0]))
    bad = root / "bad"
    bad.mkdir()
    Machine.made, Machine.x, Machine.root, Machine.bad, Machine.calls = made, x, root, bad, 0
    return made


class Machine(RuleBasedStateMachine):
    @initialize(one=st.integers(0, 5), other=st.integers(0, 5))
    def start(self, one, other):
        self.held = {"a": 2 * one, "b": 2 * other + 1}  # both layers are in the pack
        given = {name: self.made[n][0] for name, n in self.held.items()}
        self.model = pack(Small().eval(), given, capacity=CAPACITY, max_rank=5, max_labels=3)
        self.most = max(3, *(self.made[n][1] for n in self.held.values()))
        self.addresses = [p.data_ptr() for p in self.model.parameters()]

    def fits(self, number):
        return self.made[number][1] <= self.most

    @rule(name=NAMES, number=st.integers(0, 11))
    def add(self, name, number):
        if name in self.held or len(self.held) == CAPACITY or not self.fits(number):
            with pytest.raises(ValueError, match=r"name: got|got . labels"):
                add_expert(self.model, name, self.made[number][0])
        else:
            add_expert(self.model, name, self.made[number][0])
            self.held[name] = number

    @rule(name=NAMES, number=st.integers(0, 11))
    def replace(self, name, number):
        if name not in self.held or not self.fits(number):
            with pytest.raises(ValueError, match=r"name: got|got . labels"):
                replace_expert(self.model, name, self.made[number][0])
        else:
            replace_expert(self.model, name, self.made[number][0])
            self.held[name] = number

    @rule(name=NAMES)
    def remove(self, name):
        if name in self.held:
            remove_expert(self.model, name)
            del self.held[name]
        else:
            with pytest.raises(ValueError, match=f"name: got {name!r}"):
                remove_expert(self.model, name)

    @rule(name=NAMES)
    def add_what_is_none(self, name):
        with pytest.raises(ValueError, match=f"{name}"):
            add_expert(self.model, name, self.bad)

    @precondition(lambda self: self.held)
    @rule(picks=st.lists(st.integers(0, 100), min_size=ROWS, max_size=ROWS))
    def predict(self, picks):
        names = [sorted(self.held)[pick % len(self.held)] for pick in picks]
        with torch.no_grad(), use_experts(self.model, names):
            got = self.model(self.x)[:, 0]
        for row, name in enumerate(names):
            _, labels, want = self.made[self.held[name]]
            torch.testing.assert_close(got[row, :labels], want[row], rtol=1e-5, atol=1e-6)
            assert (got[row, labels:] == -torch.inf).all()

    @precondition(lambda self: self.held)
    @rule()
    def save_and_load(self):
        Machine.calls += 1
        folder = save_pack(self.model, self.root / f"pack{Machine.calls}")
        if {n % 2 for n in self.held.values()} == {0, 1}:  # else the reloaded pack would still hold both layers
            self.model = load_pack(Small().eval(), folder)
            self.addresses = [p.data_ptr() for p in self.model.parameters()]

    @invariant()
    def names_and_addresses_stay(self):
        assert sorted(self.model.adamix.pack.entries) == sorted(self.held)
        assert [p.data_ptr() for p in self.model.parameters()] == self.addresses


Machine.TestCase.settings = settings(
    max_examples=RUNS, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


def test_out_of_memory_while_adding_leaves_the_pack_as_it_was(folders, monkeypatch):
    from adamix_kernels.packs import slots

    model = pack(Small().eval(), {"a": folders[2][0], "b": folders[3][0]}, capacity=3, max_rank=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, calls = slots.plan, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plan(*arguments)

    monkeypatch.setattr(slots, "plan", failing)
    for act in (lambda: add_expert(model, "c", folders[6][0]), lambda: replace_expert(model, "a", folders[6][0])):
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            act()
        assert len(calls) == 2
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert list(model.adamix.pack.entries) == ["a", "b"]
