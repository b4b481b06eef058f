"""Jobs of a PackTrainer on tiny models, mixed batches for them, and what of a name is compared."""

import tiny
import torch

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer

LABELS = ["no", "yes", "never"]
ADAPTERS = {
    "a": PackJob(AdaMixConfig(num_experts=2, bottleneck=8), lr=3e-2, weight_decay=0.1, seed=3),
    "b": PackJob(
        AdaMixConfig(num_experts=3, bottleneck=16, share=None, routing="sample", consistency_weight=0.5),
        lr=1e-2, schedule="linear", warmup_steps=1, total_steps=9, labels=LABELS, seed=4,
    ),
    "c": PackJob(AdaMixConfig(num_experts=1, bottleneck=8, consistency_weight=0.0), max_grad_norm=None, seed=5),
}  # fmt: skip
LORA = {
    "a": PackJob(AdaMixConfig(method="lora", num_experts=2, r=4, alpha=8.0, dropout=0.3), lr=3e-2, seed=3),
    "b": PackJob(AdaMixConfig(method="lora", num_experts=4, r=8, alpha=3.0, share="down"), lr=1e-2, labels=LABELS),
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
    differ = [(n, (p - q).abs().max().item()) for n, (p, q) in enumerate(zip(one, other)) if not torch.equal(p, q)]
    assert not differ


def trainer_of(jobs, build=tiny.tiny_bert, **options):
    return PackTrainer(build(), jobs, backend="reference", **options)
