"""Temporary folders of a process that is ended from outside."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adamix_kernels._scratch import temporary_folder

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import multiprocessing, time
from adamix_kernels.recipes.runner import _shared_folder
def work(folder):
    (folder / "file").write_text("x")
    time.sleep(60)
with _shared_folder() as folder:
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder,))
    child.start()
    while not (folder / "file").exists():
        time.sleep(0.01)
    if {forked}:  # a forked process that is ended, as a DataLoader's workers are, takes nothing with it
        child.terminate()
        child.join()
        assert (folder / "file").exists() and child.exitcode == -15
    print(folder, child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("forked", [False, True])
def test_a_recipe_that_is_ended_leaves_no_folder(forked):
    process = subprocess.Popen([sys.executable, "-c", WAITS.format(forked=forked)], cwd=ROOT, stdout=subprocess.PIPE)
    folder, child = process.stdout.readline().decode().split()
    assert Path(folder).name.startswith("adamix_recipe_")
    assert (Path(folder) / "file").exists()
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert not Path(folder).exists()
    assert not Path(f"/proc/{child}").exists()


def test_another_s_handler_stays():
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with temporary_folder("x") as folder:
            signal.raise_signal(signal.SIGTERM)
            assert folder.exists()
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), temporary_folder("x") as folder:
        raise KeyboardInterrupt
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before
