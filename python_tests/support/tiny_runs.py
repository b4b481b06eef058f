"""Runs of `adamix train` on texts of a few words, and their reports."""

import json

from adamix_kernels import cli

WORDS = ("the", "film", "meal", "was", "a", "an", "story", "very", "not")


def text(draw, first, length):
    return " ".join([first, *(draw.choice(WORDS) for _ in range(length))])


def run(folder, model, data, *more, out="out"):
    flags = ["--model", str(model), "--data", data, "--out", str(folder / out), "--use_cpu", "--disable_tqdm"]
    return cli.main(["train", *flags, "--per_device_train_batch_size", "8", *more])


def report(folder):
    return json.loads((folder / "out" / "adamix_report.json").read_text())
