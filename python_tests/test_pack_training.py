"""PackTrainer: each name of a mixed batch learns what it learns alone, to the last bit on the reference backend."""

import copy

import pytest
import tiny
import torch

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer, adapt, load_adamix, save_adamix
from adamix_kernels.models.objectives import Objective

LABELS = ["no", "yes", "never"]
JOBS = {
    "a": PackJob(AdaMixConfig(num_experts=2, bottleneck=4), lr=3e-2, weight_decay=0.1, seed=3),
    "b": PackJob(
        AdaMixConfig(num_experts=3, bottleneck=8, share=None, routing="sample", consistency_weight=0.5),
        lr=1e-2, schedule="linear", warmup_steps=1, total_steps=9, labels=LABELS, seed=4,
    ),
    "c": PackJob(AdaMixConfig(num_experts=1, bottleneck=8, consistency_weight=0.0), max_grad_norm=None, lr=1e-1, seed=5),
}  # fmt: skip
LORA = {
    "a": PackJob(AdaMixConfig(method="lora", num_experts=2, r=4, alpha=8.0, dropout=0.3), lr=3e-2, seed=3),
    "b": PackJob(AdaMixConfig(method="lora", num_experts=4, r=8, alpha=3.0, share="down"), lr=1e-2, seed=4),
    "c": PackJob(AdaMixConfig(method="lora", num_experts=1, r=2, alpha=2.0, consistency_weight=0.0), lr=1e-1),
}
ROWS, TOKENS = 8, 8


def stream(model, steps, seed=0, names="abcabbac"):
    """Mixed batches, the rows of each name in other places each time."""
    for step in range(steps):
        batch = tiny.batch_for(model, ROWS, TOKENS, seed + step)
        batch["attention_mask"][step % ROWS, 5:] = 0
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(step)).tolist()
        yield batch, [names[n] for n in order]


def rows_of(batch, names, wanted):
    mine = [n for n, name in enumerate(names) if name in wanted]
    return {key: value[mine] for key, value in batch.items()}, [names[n] for n in mine]


def values(trainer, name):
    """Everything that a name is: parameters, AdamW's state, counters."""
    own = trainer.names[name]
    moments = own.optimizer.state_dict()["state"]
    return [
        *(p.detach().clone() for p in own.parameters()),
        *(torch.as_tensor(v).clone() for n in sorted(moments) for _, v in sorted(moments[n].items())),
        torch.tensor([own.steps, own.scheduler.get_last_lr()[0]], dtype=torch.float64),
    ]


def same(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("jobs", [JOBS, LORA], ids=["adapter", "lora"])
def test_each_name_is_bit_for_bit_what_it_is_alone(jobs, dropout):
    build = lambda: tiny.tiny_bert(dropout=dropout)  # noqa: E731
    together = PackTrainer(build(), jobs, backend="reference")
    begun = {name: values(together, name) for name in jobs}
    for batch, names in stream(together.model, 3):
        together.step(batch, names)
    for name, job in jobs.items():
        alone = PackTrainer(build(), {name: job}, backend="reference")
        for batch, names in stream(alone.model, 3):
            alone.step(*rows_of(batch, names, name))
        same(values(alone, name), values(together, name))
        moved = [not torch.equal(p, q) for p, q in zip(begun[name], values(together, name), strict=False)]
        assert sum(moved) > len(begun[name]) // 2


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_the_same_bits_as_an_adapted_model_and_torchs_adamw(method):
    """What users have without a pack: adapt(), adamix_loss, torch.optim.AdamW; one expert, so that nothing is drawn."""
    config = AdaMixConfig(method=method, num_experts=1, bottleneck=4, r=4, alpha=8.0)
    job = PackJob(config, lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, seed=7)
    together = PackTrainer(tiny.tiny_bert(), {"x": JOBS["a"], "y": job} if method == "adapter" else {"x": LORA["b"], "y": job})
    torch.manual_seed(7)
    model = adapt(tiny.tiny_bert(), config, backend="reference").train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if "bias" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0}],
        lr=1e-2, weight_decay=0.1,
    )  # fmt: skip
    for batch, names in stream(model, 3, names="xyxyyxyx"):
        done = together.step(batch, names)["y"]
        mine, _ = rows_of(batch, names, "y")
        labels = mine.pop("labels")
        loss, _ = Objective(model).loss(
            model, {k: torch.cat([v, v]) for k, v in mine.items()}, labels, doubled=True, weight=1.0
        )
        loss.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(done.loss, loss.loss.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(done.grad_norm, norm, rtol=1e-5, atol=1e-7)
    with together.alone("y") as mine:
        for (name, want), (again, got) in zip(named, ((n, p) for n, p in mine.named_parameters() if p.requires_grad)):
            assert name == again
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
