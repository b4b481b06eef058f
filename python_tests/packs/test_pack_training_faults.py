"""PackTrainer: failed writes, damaged files, wrong arguments, errors in the middle; what they leave as it was."""

import pytest
import tiny
import torch
from pack_jobs import ADAPTERS, LABELS, same, stream, trainer_of, values
from two_writers import write_while_locked

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer, merge, save_adamix, use_experts

LEARNED = {"routing": "learned", "mix": "weights"}


def test_two_writers_of_one_folder_wait_for_each_other(tmp_path, caplog):
    first, second = trainer_of(ADAPTERS), trainer_of(ADAPTERS)
    first.save(tmp_path)
    second.step(*next(iter(stream(second.model, 1))))
    write_while_locked(tmp_path / "a", caplog, second.save, tmp_path)
    same(values(trainer_of({"a": tmp_path / "a"}), "a"), values(second, "a"))
    assert len(list((tmp_path / "a").glob("step-*"))) == 1


def test_a_save_that_breaks_leaves_the_earlier_one(tmp_path, monkeypatch):
    from adamix_kernels.packs import training_folder

    trainer = trainer_of(ADAPTERS)
    batches = list(stream(trainer.model, 2))
    trainer.step(*batches[0])
    trainer.save(tmp_path)
    kept = values(trainer, "a")
    trainer.step(*batches[1])
    for name in ("write_safetensors_by_digest", "write_sealed_json"):
        with monkeypatch.context() as patch:
            patch.setattr(training_folder, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space left"):
                trainer.save(tmp_path)
        same(values(trainer_of({"a": tmp_path / "a"}), "a"), kept)
    trainer.save(tmp_path)
    same(values(trainer_of({"a": tmp_path / "a"}), "a"), values(trainer, "a"))
    file = next((tmp_path / "a").glob("step-*/optimizer-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    model = tiny.tiny_bert()
    with pytest.raises(ValueError, match=r"a: .*optimizer-"):
        PackTrainer(model, {"a": tmp_path / "a"})
    assert not hasattr(model, "adamix")


def test_whatever_goes_wrong_changes_nothing(monkeypatch):
    model = tiny.tiny_bert()
    for jobs, told in (
        ({}, "jobs: got {}"),
        ({"a b": ADAPTERS["a"]}, "name: got 'a b'"),
        ({"a": ADAPTERS["a"], "b": PackJob(AdaMixConfig(activation="relu"))}, "b: .*activation='relu'"),
        ({"a": PackJob(AdaMixConfig(target_modules=["absent"]))}, "a: target_modules"),
        ({"a": PackJob(AdaMixConfig(modules_to_save=[]), labels=LABELS)}, "a: labels: got 3"),
        ({"a": "nowhere"}, "a: .*adamix_job.json: got no such file"),
    ):
        with pytest.raises(ValueError, match=told):
            PackTrainer(model, jobs)
        assert not hasattr(model, "adamix")
        assert all(p.requires_grad for p in model.parameters())
    trainer = PackTrainer(model, {"a": ADAPTERS["a"]}, capacity=2, backend="reference")
    batch = tiny.batch_for(model, 4)
    for job, told in (
        (PackJob(AdaMixConfig(bottleneck=9)), "b: .*rank of at most 8"),
        (PackJob(AdaMixConfig(bottleneck=8, num_experts=5)), "b: num_experts: got 5, expected at most 2"),
        (PackJob(AdaMixConfig(method="lora")), "b: .*query: got a job that trains it"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer.add("b", job)
    for given, names, told in (
        (batch, ["a"] * 3, "names: got 3 for 4 rows"),
        (batch, ["a", "a", "a", "z"], "names: got 'z'"),
        ({k: v for k, v in batch.items() if k != "labels"}, ["a"] * 4, "tensor of labels"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer.step(given, names)
    with pytest.raises(ValueError, match="being trained"):
        model(**{k: v for k, v in batch.items() if k != "labels"})
    with pytest.raises(ValueError, match="being trained"), use_experts(model, "a"):
        pass
    with pytest.raises(ValueError, match="pack"):
        save_adamix(model, "never")
    before = values(trainer, "a")
    trainer.accumulate(batch, ["a"] * 4)
    backward = torch.autograd.backward

    def failing(*arguments):
        backward(*arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "backward", failing)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.accumulate(batch, ["a"] * 4)
    assert trainer.update() == {}
    same(values(trainer, "a"), before)
    fresh = trainer_of({"a": ADAPTERS["a"]})
    assert torch.equal(trainer.step(batch, ["a"] * 4)["a"].loss, fresh.step(batch, ["a"] * 4)["a"].loss)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"lr": -1.0}, "lr: got -1.0"), ({"betas": (1.0, 0.9)}, "betas"), ({"schedule": "wavy"}, "schedule"),
        ({"schedule": "linear"}, "total_steps: got None"), ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"labels": "yes"}, "labels"), ({"labels": ["a", "a"]}, "labels"), ({"problem": "hard"}, "problem"),
        ({"seed": True}, "seed"), ({"config": AdaMixConfig(routing="token")}, "config.routing"),
        *(({"config": AdaMixConfig(**LEARNED, **more)}, "config.routing: got 'learned', .*AdaMixTrainer")
          for more in ({"router": "linear"}, {"router": "task", "num_tasks": 2}, {"router": "sentence"})),
    ],
)  # fmt: skip
def test_a_job_that_is_none(option, told):
    with pytest.raises(ValueError, match=told):
        PackJob(**{"config": AdaMixConfig(), **option})
    job = ADAPTERS["b"]
    assert PackJob.from_dict(job.to_dict()) == job


def test_every_process_has_rows(monkeypatch):
    trainer = trainer_of({"a": PackJob(AdaMixConfig(bottleneck=4), total_steps=1)})
    batch = tiny.batch_for(trainer.model, 4)
    rows = [{name: value[n] for name, value in batch.items()} for n in range(4)]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in batch}

    with pytest.raises(ValueError, match="batch_size: got 0"):
        trainer.train({"a": rows}, collate, batch_size=0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(ValueError, match="batch_size: got 1 for 2 processes, expected at least 2"):
        trainer.train({"a": rows}, collate, batch_size=1)
    assert trainer.names["a"].next_rows(4, 2) != []
    assert trainer.names["a"].steps == 0


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_merge_that_could_not_be_undone_is_refused(method, tmp_path):
    jobs = {
        "a": PackJob(AdaMixConfig(method=method, num_experts=2, bottleneck=4, r=2)),
        "b": PackJob(AdaMixConfig(method=method)),
    }
    trainer = trainer_of(jobs)
    batch, names = next(stream(trainer.model, 1, names="aabbabab"))
    trainer.step(batch, names)
    before = values(trainer, "a")
    with trainer.alone("a") as model:
        with pytest.raises(ValueError, match=r"keep: got False for the name 'a' of a PackTrainer, .*expected True"):
            merge(model, keep=False)
        assert not model.adamix.merged
        save_adamix(merge(model), tmp_path / "a")
    same(values(trainer, "a"), before)
    trainer.step(batch, names)
    with trainer.alone("a") as model:  # what went on is what is there
        assert not model.adamix.merged
    assert not any(torch.equal(p, q) for p, q in zip(values(trainer, "a")[:2], before[:2]))
