"""DDP over gloo on two processes, one of which dies: the other ends with an error, in bounded time."""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from adamix_kernels import AdaMixTrainer, adamix_loss, double_batch

from ..children import Child, kill_self, killed
from ..record import Figure
from ..small_models import adapted, batch

_KIND = "BERT, adapters"
_STEPS, _FATAL = 6, 2
BOUND = 60.0  # seconds from a rank's death to the other's end
_GLOO_TIMEOUT = 600  # seconds; far beyond BOUND, so that it is not what ends the survivor
_ENDED_WITH_ERROR = 1

# How a rank goes: killed at three moments of its step, or ended by an exception of its own.
DEATHS = (
    "kill -9 before forward",
    "kill -9 in forward",
    "kill -9 in backward",
    "exception",
    "kill -9 under AdaMixTrainer",
)


def figures(every: bool) -> Iterator[Figure]:
    for death in DEATHS if every else (DEATHS[2], DEATHS[4]):
        for dying in (0, 1) if every else (1,):
            yield _figure(death, dying)


def _figure(death: str, dying: int) -> Figure:
    start = time.perf_counter()
    seconds, survivor, gone = outcome(death, dying)
    ended = f"ended with status {survivor}" if survivor is not None else "hung"
    return Figure(
        f"two DDP processes (gloo), rank {dying}: {death}; what the other does",
        f"{ended}{f' after {seconds:.1f} s' if survivor is not None else f', {BOUND:.0f} s long'}",
        f"an error (status {_ENDED_WITH_ERROR}) within {BOUND:.0f} s",
        survivor == _ENDED_WITH_ERROR and seconds < BOUND and (killed(gone) or death == "exception"),
        time.perf_counter() - start,
    )


def outcome(death: str, dying: int) -> tuple[float, int | None, int | None]:
    """(seconds from the death to the survivor's end, its exit status or None where it hung, the dead one's status)."""
    work = trainer_rank if death.endswith("AdaMixTrainer") else plain_rank
    with tempfile.TemporaryDirectory() as name:
        port = _free_port()
        children = [Child(work, Path(name), rank, dying, death, port) for rank in range(2)]
        gone = children[dying].end()
        died = time.perf_counter()
        survivor = children[1 - dying].end(BOUND)
        return time.perf_counter() - died, survivor, gone


def plain_rank(folder: Path, rank: int, dying: int, death: str, _port: int, send: Callable) -> None:
    """A training loop of a few steps."""
    _quiet(folder, rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=_GLOO_TIMEOUT),
    )  # fmt: skip
    model = adapted(_KIND).train()
    network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = batch(_KIND)
    labels = rows.pop("labels")
    for step in range(_STEPS):
        if step == _FATAL and rank == dying:
            _arrange(death, model)
        adamix_loss(network(**double_batch(rows)).logits, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    send("finished")


def _arrange(death: str, model: torch.nn.Module) -> None:
    if death == "exception":
        raise FloatingPointError("a NaN on one rank")
    if death.endswith("before forward"):
        kill_self()
    layer = model.get_submodule(model.adamix.paths[-1])
    if death.endswith("in forward"):
        layer.register_forward_hook(lambda *_: kill_self())
    else:
        layer.adapter.down_weight.register_hook(lambda _gradient: kill_self())


class _Dies(TrainerCallback):
    def on_step_begin(self, _args, state, *_more, **_kwargs):
        if state.global_step == _FATAL:
            kill_self()


def trainer_rank(folder: Path, rank: int, dying: int, _death: str, port: int, send: Callable) -> None:
    _quiet(folder, rank)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    rows = batch(_KIND, 8)
    data = [{name: value[i] for name, value in rows.items()} for i in range(8)]
    args = TrainingArguments(
        str(folder / "out"), max_steps=_STEPS, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2, ddp_backend="gloo", ddp_timeout=_GLOO_TIMEOUT,
    )  # fmt: skip
    trainer = AdaMixTrainer(adapted(_KIND), args, train_dataset=data)
    if args.world_size != 2:
        raise RuntimeError(f"world_size: got {args.world_size}, expected 2")
    if rank == dying:
        trainer.add_callback(_Dies())
    trainer.train()
    send("finished")


def _quiet(folder: Path, rank: int) -> None:
    """The errors that are wanted here are no one's to read, but for who looks for them."""
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
