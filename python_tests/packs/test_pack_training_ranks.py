"""PackTrainer in two processes: the same as one process with all rows, and the same in both."""

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer, load_adamix

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not there")
JOBS = {
    "a": PackJob(AdaMixConfig(method="lora", num_experts=1, r=4), lr=1e-2),
    "b": PackJob(AdaMixConfig(method="lora", num_experts=1, r=2, consistency_weight=0.0), lr=1e-2),
}
STEPS = 2


def rows(model, step):
    batch = tiny.batch_for(model, 8, 6, step)
    return batch, list("aaabaabb" if step else "aaaabaaa")  # at the first step the second process has no row of b


def values(trainer):
    return {name: [p.detach().clone() for p in own.parameters()] for name, own in trainer.names.items()}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer = PackTrainer(tiny.tiny_bert(), JOBS, backend="reference")
    for step in range(STEPS):
        batch, names = rows(trainer.model, step)
        half = slice(0, 5) if rank == 0 else slice(5, 8)
        done = trainer.step({k: v[half] for k, v in batch.items()}, names[half])
        assert sorted(done) == ["a", "b"]
    trainer.save(f"{folder}/state")
    torch.save((values(trainer), [list(s) for s in done.values()]), f"{folder}/{rank}")
    trainer.finish("b", f"{folder}/b")
    assert list(trainer.names) == ["a"]
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    (first, done), (second, _) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    trainer = PackTrainer(tiny.tiny_bert(), JOBS, backend="reference")
    for step in range(STEPS):
        want = trainer.step(*rows(trainer.model, step))
    for name, parameters in values(trainer).items():
        for mine, one, two in zip(parameters, first[name], second[name]):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, mine, rtol=1e-4, atol=1e-5)
    for got, expected in zip(done, want.values()):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(list(expected)), rtol=1e-4, atol=1e-5)
    again = PackTrainer(tiny.tiny_bert(), tmp_path / "state", backend="reference")
    assert again.names["a"].steps == STEPS
    assert all(torch.equal(p, q) for p, q in zip(values(again)["a"], first["a"]))
    assert load_adamix(tiny.tiny_bert(), tmp_path / "b").adamix.merged
