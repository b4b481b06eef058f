"""The training report: what is counted and compared, the picture, the figures, TensorBoard's scalars."""

import json

import pytest
import tiny
import torch
from tiny_training import adapted, arguments, dataset_for, trainer_for

from adamix_kernels import AdaMixTrainer, merge
from adamix_kernels.reports import TrainingReport, routing_scores
from adamix_kernels.reports.figures import deviation, mean_curve, smooth
from adamix_kernels.reports.observers import Agreement, DrawCounter


def test_draws_are_counted_by_layer(monkeypatch):
    model = adapted(tiny.tiny_bert(), num_experts=3, routing="sample")
    batch = tiny.batch_for(model, 4)
    drawn = []
    original = type(model.adamix.router).draw

    def spy(self, *args):
        drawn.append(original(self, *args))
        return drawn[-1]

    monkeypatch.setattr(type(model.adamix.router), "draw", spy)
    counter = DrawCounter(model)
    assert counter.shares() == []
    counter.start()
    for _ in range(2):
        model.train()(**batch)
    model.eval()(**batch)
    indices = [index for index in drawn if index is not None]
    expected = [
        torch.bincount(torch.cat(indices[layer :: tiny.LAYERS]), minlength=3) / 8.0 for layer in range(tiny.LAYERS)
    ]
    torch.testing.assert_close(torch.tensor(counter.shares()), torch.stack(expected))
    counter.stop()
    model.train()(**batch)
    assert "draw" not in vars(model.adamix.router)
    torch.testing.assert_close(torch.tensor(counter.shares()), torch.stack(expected))


def test_agreement_is_the_share_of_equal_classes():
    model = adapted(tiny.tiny_bert())
    agreement = Agreement(model)
    agreement.start()
    batch = tiny.batch_for(model, 6)
    logits = model.train()(**batch).logits.argmax(-1)
    assert agreement.take() == pytest.approx((logits[:3] == logits[3:]).float().mean().item())
    model.eval()(**batch)
    assert agreement.take() is None
    agreement.stop()


def test_scores_by_routing_leave_the_model_as_it_was():
    model = adapted(tiny.tiny_bert(), num_experts=3).train()
    batch = tiny.batch_for(model, 8)
    state = torch.get_rng_state()
    scores = routing_scores(model, lambda m: m(**batch).logits.sum().item(), draws=4)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert len(scores["experts"]) == 3 == len(set(scores["experts"]))
    assert len(scores["random"]) == 4
    assert scores["merged"] == pytest.approx(merge(model.eval())(**batch).logits.sum().item(), rel=1e-4)


def test_a_run_leaves_picture_and_figures(tmp_path):
    model = adapted(tiny.tiny_bert())
    report = TrainingReport(
        tmp_path / "report", score=lambda m: m(**tiny.batch_for(m)).logits.mean().item(), draws=2, tensorboard=False
    )
    trainer = trainer_for(model, tmp_path, max_steps=3)
    trainer.add_callback(report)
    trainer.train()
    values = json.loads((tmp_path / "report" / "training_report.json").read_text())
    assert [p["step"] for p in values["points"]] == [1, 2, 3]
    logged = [log for log in trainer.state.log_history if "consistency" in log]
    assert [p["consistency"] for p in values["points"]] == [log["consistency"] for log in logged]
    assert all(0 <= p["agreement"] <= 1 for p in values["points"])
    assert torch.tensor(values["usage"]).shape == (tiny.LAYERS, 3)
    assert torch.tensor(values["usage"]).sum(1) == pytest.approx(1.0)
    assert len(values["routings"]["experts"]) == 3
    assert (tmp_path / "report" / "training_report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not (tmp_path / "report" / "tensorboard").exists()


def test_the_report_changes_no_training(tmp_path):
    weights = []
    for callbacks in ([], [TrainingReport(tmp_path / "r", tensorboard=False)]):
        model = adapted(tiny.tiny_bert(dropout=0.1))
        AdaMixTrainer(model, arguments(tmp_path), train_dataset=dataset_for(model), callbacks=callbacks).train()
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_a_language_model_has_no_agreement(tmp_path):
    model = adapted(tiny.tiny_gpt2())
    report = TrainingReport(tmp_path / "r", tensorboard=False)
    trainer = trainer_for(model, tmp_path)
    trainer.add_callback(report)
    trainer.train()
    assert [p["agreement"] for p in report.points] == [None, None]
    assert report.usage
    assert (tmp_path / "r" / "training_report.png").is_file()


def test_scalars_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = adapted(tiny.tiny_bert())
    trainer = trainer_for(model, tmp_path)
    trainer.add_callback(
        TrainingReport(tmp_path / "r", score=lambda m: 50.0, score_name="f1", draws=1, tensorboard=True)
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"adamix/loss", "adamix/cross_entropy", "adamix/consistency", "adamix/agreement"} <= tags
    assert {"adamix/usage/expert_0", "adamix/f1/merged", "adamix/f1/expert_2", "adamix/f1/random"} <= tags
    assert [e.step for e in events.Scalars("adamix/loss")] == [1, 2]


def test_tensorboard_asked_for_and_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard: got True"):
        TrainingReport(tmp_path, tensorboard=True)
    assert TrainingReport(tmp_path)._writer_class is None


def test_small_statistics():
    assert mean_curve([[1.0, 2.0], [3.0, 4.0]]) == [2.0, 3.0]
    assert smooth([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
    assert (deviation([1.0]), deviation([1.0, 3.0])) == (0.0, pytest.approx(2**0.5))
