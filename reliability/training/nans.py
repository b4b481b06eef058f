"""ADAMIX_CHECK=1: a NaN in any expert of any layer stops the training, and the message names both."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainingArguments

from adamix_kernels import AdaMixTrainer

from ..record import Figure
from ..small_models import KINDS, adapted, batch, trained

_STEPS = 60


def figures() -> Iterator[Figure]:
    for kind in KINDS:
        yield _figure(kind)


def _figure(kind: str) -> Figure:
    start = time.perf_counter()
    named = whole = tried = 0
    for path, name, expert in places(kind):
        model = adapted(kind, routing="token")
        error, unchanged = stop(kind, model, f"{path}.{name}", expert)
        bank = name.rpartition(".")[2]
        named += (
            error is not None
            and bool(re.match(rf"{re.escape(path)}: got nan ", error))
            and (f"{bank} of expert {expert} holds nan" in error)
        )
        whole += unchanged
        tried += 1
    return Figure(
        f"{kind}: NaN in one expert's weights, every layer, bank and expert in turn, ADAMIX_CHECK=1",
        f"{named} of {tried} stopped with layer and expert named, {whole} with the weights as they were",
        f"{tried}",
        named == whole == tried > 0,
        time.perf_counter() - start,
    )


def places(kind: str) -> list[tuple[str, str, int]]:
    """(layer, bank in it, expert) of every expert."""
    model = adapted(kind)
    return [
        (path, name, expert)
        for path in model.adamix.paths
        for name, bank in model.get_submodule(path).named_parameters()
        if bank.requires_grad
        for expert in range(bank.shape[0])
    ]


def stop(kind: str, model: nn.Module, bank: str, expert: int, check: str = "1") -> tuple[str | None, bool]:
    """(the message that stopped a training in which one number of the expert is NaN, whether it changed nothing)."""
    with torch.no_grad():
        model.get_parameter(bank)[expert].view(-1)[0] = float("nan")
    before = trained(model)
    rows = batch(kind, 4)
    data = [{name: value[i] for name, value in rows.items()} for i in range(4)]
    with tempfile.TemporaryDirectory() as folder, _environment(check), open(os.devnull, "w") as nowhere:
        args = TrainingArguments(
            folder, max_steps=_STEPS if check == "1" else 1, save_strategy="no", use_cpu=True, report_to=[],
            disable_tqdm=True, per_device_train_batch_size=2, logging_steps=1000,
        )  # fmt: skip
        try:
            with contextlib.redirect_stdout(nowhere):
                AdaMixTrainer(model, args, train_dataset=data).train()
        except FloatingPointError as error:
            return str(error), all(_same(before[name], value) for name, value in trained(model).items())
    return None, False


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@contextlib.contextmanager
def _environment(check: str) -> Iterator[None]:
    before = os.environ.get("ADAMIX_CHECK")
    os.environ["ADAMIX_CHECK"] = check
    try:
        yield
    finally:
        if before is None:
            del os.environ["ADAMIX_CHECK"]
        else:
            os.environ["ADAMIX_CHECK"] = before
