"""The demo, small: a random encoder, one epoch."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_text
import torch
from suite_size import NIGHTLY

from adamix_kernels import load_adamix, tasks
from adamix_kernels.demo import report, run, seeds, training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, arguments) of one finished run with two seeds."""
    folder = tmp_path_factory.mktemp("demo")
    encoder, data = tiny_text.write_encoder(folder / "encoder"), tiny_text.write_data(folder / "data")
    arguments = ["--model", str(encoder), "--data", str(data), "--out", str(folder / "out")]
    arguments += ["--epochs", "1", "--seeds", "2", "--batch-size", "5", "--jobs", "1", "--bottleneck", "3"]
    assert run.main(arguments) == 0
    return folder / "out", arguments


def test_results_hold_every_method_and_figure(finished):
    folder = finished[0]
    results = json.loads((folder / "results.json").read_text())
    methods = {m["name"]: m for m in results["methods"]}
    assert list(methods) == [seeds.FROZEN, seeds.PLAIN, seeds.LONGER, seeds.RANDOM, seeds.MERGED]
    head, plain = 2 * 16 + 2, 2 * (2 * 3 * 16 + 3 + 16)
    experts = 2 * (4 * (3 * 16 + 3) + 16 * 3 + 16)
    counts = {name: (m["trainable"], m["kept"]) for name, m in methods.items()}
    assert counts == {
        seeds.FROZEN: (head, head),
        seeds.PLAIN: (head + plain, head + plain),
        seeds.LONGER: (head + plain, head + plain),
        seeds.RANDOM: (head + experts, head + experts),
        seeds.MERGED: (head + experts, head + plain),
    }
    for method in methods.values():
        assert len(method["accuracy"]) == 2
        assert all(0 <= a <= 100 for a in method["accuracy"])
        assert method["seconds_per_step"] > 0
        assert [len(curve) for curve in method["cross_entropy"]] == [6 if method is methods[seeds.LONGER] else 3] * 2
        assert all(total >= step for total, step in zip(method["training"], method["seconds"]))
    assert [len(c) for c in methods[seeds.PLAIN]["consistency"]] == [0, 0]
    assert all(0 < value < 1 for value in itertools.chain(*methods[seeds.MERGED]["consistency"]))
    assert results["command"].endswith("--bottleneck 3")
    assert results["versions"]["torch"] == torch.__version__


def test_plot_is_a_png(finished):
    assert (finished[0] / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_merged_checkpoint_is_a_plain_adapter_with_the_accuracy_of_the_first_seed(finished):
    folder = finished[0]
    run = tasks.read_run(folder / "merged")
    model, tokenizer = tasks.load_classifier(tasks.resolve_model(run.model), run.label_names, run.pooling)
    load_adamix(model, folder / "merged")
    assert model.adamix.merged
    rows = tasks.tokenize(tasks.load_task(run.data).dev, tokenizer, run.max_tokens)
    methods = json.loads((folder / "results.json").read_text())["methods"]
    assert tasks.accuracy(tasks.predict(model, rows, tasks.collator(tokenizer)), rows) == methods[-1]["accuracy"][0]


def test_the_same_seeds_give_the_same_losses_one_after_the_other_and_at_a_time(finished, tmp_path, capfd):
    folder, arguments = finished
    assert run.main([*arguments, "--out", str(tmp_path), "--jobs", "5"]) == 0
    first, second = (json.loads((f / "results.json").read_text()) for f in (folder, tmp_path))
    assert (first["machine"]["jobs"], second["machine"]["jobs"]) == (1, 2)
    for key in ("name", "trainable", "kept", "accuracy", "cross_entropy", "consistency"):
        assert [m[key] for m in first["methods"]] == [m[key] for m in second["methods"]]
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {f.name for f in (folder / "merged").iterdir()}
    assert "30/30" in capfd.readouterr().err  # the steps of both processes


def test_what_fails_in_a_process_of_its_own_is_told(finished, tmp_path):
    _, arguments = finished
    task = tasks.load_task(arguments[3])
    _, tokenizer = tasks.load_classifier(tasks.resolve_model(arguments[1]), task.label_names)
    data = training.prepare(task, tokenizer, 16, 4, None, seeds=1)
    settings = training.Settings(epochs=1, batch_size=4, lr=0.1, adamix_lr=0.1, head_lr=0.1, consistency=1.0)
    work = seeds.Work(tasks.Encoder("gone", str(tmp_path / "gone"), False), task.label_names, settings, 2, 3, tmp_path)
    with pytest.raises(ValueError, match="model: cannot load 'gone'"):
        seeds.all_seeds(work, data, 2, seeds._Told())


class Killed(seeds.Work):
    """Each seed's process is killed at its first model, as a machine without memory would."""

    def fresh(self):
        if seeds._Told.steps is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fresh()


def test_a_process_that_is_killed_is_one_line_and_status_1(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run, "Work", Killed)
    assert run.main([*finished[1], "--out", str(tmp_path), "--jobs", "2"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("demo: a seed's process ended before it was done")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("jobs", ["1", "2"] if NIGHTLY else ["2"])
def test_an_interrupt_ends_every_process_in_one_line(finished, tmp_path, jobs):
    command = [sys.executable, "-m", "adamix_kernels.demo", *finished[1], "--out", str(tmp_path)]
    command += ["--jobs", jobs, "--epochs", "100000"]
    log = tmp_path / "log"
    with log.open("w") as file:
        # A terminal's Ctrl-C reaches the whole group. What a shell runs in the background inherits that it is ignored.
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            sent = {"1": "frozen encoder", "2": "2 seeds at a time"}[jobs]
            _until(lambda: sent in log.read_text() or process.poll() is not None)
            time.sleep(0.5)  # the processes of two seeds have begun, and import
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(120) == 130
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert log.read_text().splitlines()[-1] == "demo: interrupted"
    assert "Traceback" not in log.read_text()
    _until(lambda: not _alive(process.pid))


def _until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_seed_draws_its_own_few_rows_and_all_read_the_same_dev_rows(finished):
    _, arguments = finished
    task = tasks.load_task(arguments[3])
    _, tokenizer = tasks.load_classifier(tasks.resolve_model(arguments[1]), task.label_names)
    few = training.prepare(task, tokenizer, 16, 4, None, seeds=3)
    drawn = [[row["input_ids"] for row in data.train] for data in few]
    assert [len(rows) for rows in drawn] == [4, 4, 4]
    assert [sum(row["labels"] for row in data.train) for data in few] == [2, 2, 2]
    assert drawn[0] != drawn[1] or drawn[1] != drawn[2]
    assert all(data.dev is few[0].dev for data in few)
    everything = training.prepare(task, tokenizer, 16, None, None, seeds=2)
    assert [len(data.train) for data in everything] == [len(task.train)] * 2


def test_the_comparison_is_seed_by_seed():
    ours, other = report.MethodResult("a", accuracy=[50.0, 52.5]), report.MethodResult("b", accuracy=[49.0, 53.0])
    assert report.compared(ours, [other]) == "a, minus b, seed by seed: +1.0, -0.5"


def test_batches_are_shuffled_by_seed_and_cover_every_row():
    settings = training.Settings(epochs=2, batch_size=4, lr=0.1, adamix_lr=0.1, head_lr=0.1, consistency=1.0)
    rows = [{"input_ids": [0] * n} for n in (3, 9, 5, 7, 2, 8, 4, 6, 9, 1)]
    made = list(training.batches(rows, settings, seed=1))
    assert sorted(len(b) for b in made) == [2, 2, 4, 4, 4, 4]
    assert len(made) == settings.steps(10)
    assert sorted(itertools.chain(*made[:3])) == list(range(10))
    assert made == list(training.batches(rows, settings, seed=1))
    assert made != list(training.batches(rows, settings, seed=2))


def test_frozen_features_ignore_padding(tmp_path):
    model, tokenizer = tasks.load_classifier(tasks.resolve_model(str(tiny_text.write_encoder(tmp_path))), ["a", "b"])
    rows = tasks.tokenize(tasks.TextSplit(["good", "the film was very bad"], None, [0, 1]), tokenizer, 16)
    collate = tasks.collator(tokenizer)
    together = training.frozen_features(model, training.Data(rows, rows[:1], collate))
    torch.testing.assert_close(together["train"][:1], together["dev"])


def test_adapted_rows_read_the_features_of_the_frozen_row(tmp_path):
    encoder = tasks.resolve_model(str(tiny_text.write_encoder(tmp_path)))
    model, tokenizer = tasks.load_classifier(encoder, ["a", "b"], "mean")
    rows = tasks.tokenize(tasks.TextSplit(["good", "the film was very bad"], None, [0, 1]), tokenizer, 16)
    data = training.Data(rows, rows, tasks.collator(tokenizer))
    expected = model.classifier(training.frozen_features(model, data)["dev"])
    torch.testing.assert_close(tasks.predict(model, rows, data.collate), expected)


def test_deviation_is_the_sample_deviation():
    result = report.MethodResult("x", accuracy=[50.0, 52.0])
    assert (result.mean, round(result.deviation, 6)) == (51.0, round(2**0.5, 6))
    assert report.MethodResult("x", accuracy=[50.0]).deviation == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "./nowhere"], "no such folder"),
        (["--model", "./nowhere"], "cannot load './nowhere'"),
        (["--consistency", "0"], "--consistency must be above 0"),
        (["--shots", "-1"], "--shots: got -1, expected a number of rows, or 0 for all"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    assert run.main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: ")
    assert error.count("\n") == 1
    assert message in error
