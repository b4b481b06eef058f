"""Every test: offline, one intra-op thread in each process, fixed seeds, Hypothesis' cases too, and no time limit for
one of those."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For the processes that tests start: threads on busy cores wait for each other, and use the cores while they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from suite_size import NIGHTLY

from adamix_kernels.ops import _direct, _passes

torch.set_num_threads(1)
# A run on a busy machine is no other test; new cases are reliability's part to draw.
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


def pytest_collection_modifyitems(config, items):
    dropped = [] if NIGHTLY else [item for item in items if item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_second_pass_yet(monkeypatch):
    """A loss that an earlier test compiled would keep the guard of models/watch.py silent for the whole process."""
    monkeypatch.setattr(_passes.LOOKS, "compiled", False)


@pytest.fixture(autouse=True)
def _nothing_planned_yet():
    """A plan that an earlier test made, under what it patched, would serve a later one where kernels are compiled."""
    _direct.forget_all()


@pytest.fixture(autouse=True)
def _log_level():
    """The command line sets it for the whole process, in fixtures of whole modules too; so may a library."""
    logging.disable(logging.NOTSET)
    for name in [None, *(n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "adamix_kernels")]:
        logger = logging.getLogger(name)
        logger.disabled = False
        logger.setLevel(logging.WARNING if name is None else logging.NOTSET)
        logger.propagate = True


@pytest.fixture
def encoder(tmp_path):
    """The folder of a tiny BERT and its tokenizer."""
    import tiny_text

    return tiny_text.write_encoder(tmp_path / "encoder")
