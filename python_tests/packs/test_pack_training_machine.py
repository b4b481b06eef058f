"""Random calls of join, leave, pause, train, look, save and restore against trainers of one name each."""

import pytest
import tiny
import torch
from suite_size import NIGHTLY
from torch.nn import functional as F

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

CAPACITY, ROWS, RANK = 3, 6, 16
RUNS = 40 if NIGHTLY else 3  # of 25 calls each: a thousand
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
ROOM = {"max_rank": RANK, "max_experts": 3, "backend": "reference"}
JOBS = [
    PackJob(
        AdaMixConfig(
            num_experts=1 + n % 3,
            bottleneck=RANK // (1 + n % 2),
            share=(None, "up", "down")[n % 3],
            routing=("batch", "sample")[n % 2],
            consistency_weight=float(n % 3),
        ),
        lr=10 ** -(1 + n % 3),
        weight_decay=0.1 * (n % 2),
        max_grad_norm=(None, 0.1)[n % 2],
        labels=(None, ["a", "b", "c"])[n // 3],
        seed=n,
    )
    for n in range(6)
]


@pytest.fixture(scope="module", autouse=True)
def products_by_sample():
    """Of the base's [B, H]: BLAS rounds two rows otherwise than sixteen."""
    linear, patch = F.linear, pytest.MonkeyPatch()

    def each(x, weight, bias=None):
        frozen = not weight.requires_grad and x.dim() == 2
        return torch.cat([linear(row, weight, bias) for row in x.split(1)]) if frozen else linear(x, weight, bias)

    patch.setattr(F, "linear", each)
    yield
    patch.undo()


class Training(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.paused, self.seen = set(), 0

    @initialize(number=st.integers(0, 5))
    def start(self, number):
        build = tiny.tiny_bert(dropout=0.1)
        self.trainer = PackTrainer(build, {"a": JOBS[number]}, capacity=CAPACITY, **ROOM)
        self.alone = {"a": PackTrainer(tiny.tiny_bert(dropout=0.1), {"a": JOBS[number]}, **ROOM)}

    @rule(name=NAMES, number=st.integers(0, 5))
    def join(self, name, number):
        if name in self.alone or len(self.alone) == CAPACITY:
            with pytest.raises(ValueError, match=f"name: got {name!r}"):
                self.trainer.add(name, JOBS[number])
        else:
            self.trainer.add(name, JOBS[number])
            self.alone[name] = PackTrainer(tiny.tiny_bert(dropout=0.1), {name: JOBS[number]}, **ROOM)

    @rule(name=NAMES)
    def leave(self, name):
        if name in self.alone:
            self.trainer.remove(name)
            del self.alone[name]
            self.paused.discard(name)
        else:
            with pytest.raises(ValueError, match=f"name: got {name!r}"):
                self.trainer.remove(name)

    @rule(name=NAMES)
    def pause_or_resume(self, name):
        if name in self.paused:
            self.trainer.resume(name)
            self.paused.remove(name)
        elif name in self.alone:
            self.trainer.pause(name)
            self.paused.add(name)

    @precondition(lambda self: set(self.alone) - self.paused)
    @rule(picks=st.lists(st.integers(0, 50), min_size=ROWS, max_size=ROWS), twice=st.booleans())
    def train(self, picks, twice):
        active = sorted(set(self.alone) - self.paused)
        names = [active[pick % len(active)] for pick in picks]
        for _ in range(1 + twice):
            self.seen += 1
            batch = tiny.batch_for(self.trainer.model, ROWS, 8, self.seen)
            self.trainer.accumulate(batch, names)
            for name in set(names):
                mine = [n for n, whose in enumerate(names) if whose == name]
                self.alone[name].accumulate({key: value[mine] for key, value in batch.items()}, [name] * len(mine))
        done = self.trainer.update()
        assert sorted(done) == sorted(set(names))
        for name, step in done.items():
            want = self.alone[name].update()[name]
            assert torch.equal(step.loss, want.loss), name
            assert (step.lr, step.step) == (want.lr, want.step)

    @precondition(lambda self: self.paused)
    @rule()
    def train_a_paused_one(self):
        name = min(self.paused)
        with pytest.raises(ValueError, match="paused"):
            self.trainer.step(tiny.batch_for(self.trainer.model, 2), [name] * 2)

    @precondition(lambda self: self.alone)
    @rule(name=NAMES)
    def look(self, name):
        if name not in self.alone:
            return
        inputs = {key: value for key, value in tiny.batch_for(self.trainer.model).items() if key != "labels"}
        found = []
        for trainer in (self.trainer, self.alone[name]):
            with trainer.alone(name) as model, torch.no_grad():
                found.append(model.eval()(**inputs).logits)
        assert torch.equal(*found)

    @invariant()
    def each_is_as_alone(self):
        assert sorted(self.trainer.names) == sorted(self.alone)
        for name, trainer in self.alone.items():
            pairs = zip(self.trainer.names[name].parameters(), trainer.names[name].parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs), name


Training.TestCase.settings = settings(
    max_examples=RUNS, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestTraining = Training.TestCase
