"""The supply chain's figures in their small size, and that each of them can be wrong."""

import pickle
import zipfile

import pytest
import torch

from reliability import supply_chain
from reliability.supply_chain import offline, pickles, versions, wheels


def test_every_figure_is_as_expected():
    figures = list(supply_chain.run("small"))
    assert len(figures) == 7
    wrong = [f"{figure.about}: {figure.value}, expected {figure.expected}" for figure in figures if not figure.passed]
    assert not wrong


def test_a_bound_that_is_not_pinned_is_seen():
    bounds = versions.lower_bounds()
    assert {"torch", "transformers", "accelerate", "peft", "pytest"} <= bounds.keys()
    pinned = versions.pins(versions.OLDEST)
    assert versions.not_the_bound({**bounds, "torch": versions.Version("2.12")}, pinned) == ["torch 2.12"]
    with pytest.raises(ValueError, match="lower bound"):
        versions.lower_bounds('[project]\ndependencies = ["torch<3"]\n[project.scripts]')


def test_a_lock_out_of_bounds_without_hashes_or_with_places_is_seen():
    assert "torch>=2.6" in versions.outside("torch==2.5.0 \\\n    --hash=sha256:" + 64 * "0")
    assert versions.without_hash("a==1 \\\n    --hash=sha256:" + 64 * "0" + "\nb==2") == ["b==2"]
    assert versions.places("a @ file:///home/me/a.whl")
    assert versions.places("--index-url https://host/simple")


def test_a_module_that_reaches_for_the_network_is_seen(tmp_path):
    package = tmp_path / "talkative"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "quiet.py").write_text("")
    (package / "loud.py").write_text("import socket\nsocket.create_connection(('127.0.0.1', 9))\n")
    imported, asked, unavailable = offline.import_all("talkative", tmp_path)
    assert imported == 2
    assert not unavailable
    assert [entry.partition("(")[0] for entry in asked] == ["socket.getaddrinfo"]


@pytest.mark.parametrize(
    "code", ["import torch\ntorch.save(1, 'x')", "import pickle\npickle.dumps(1)", "from pickle import dump"]
)
def test_a_call_that_writes_a_pickle_is_seen(code, tmp_path):
    (tmp_path / "bad.py").write_text(code)
    assert pickles.calls_in(tmp_path) == ["bad.py:module"]


def test_a_pickle_on_the_disk_is_seen(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "text.json").write_text("{}")
    assert [pickles.is_pickle(tmp_path / name) for name in ("zip.bin", "plain.bin", "text.json")] == [True, True, False]


def test_a_call_of_the_package_to_a_writer_is_seen(tmp_path):
    from adamix_kernels.models import _files

    with pickles.watched() as ours:
        torch.save(1, tmp_path / "not_the_package.bin")
        _files.write_pickled_tensors(tmp_path / "x.bin", {"a": torch.ones(1)})
    assert ours == ["adamix_kernels.models._files.write_pickled_tensors"]


def test_a_path_or_a_stray_file_in_a_wheel_is_seen(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("adamix_kernels/__init__.py", f"# {tmp_path}/project")
        file.writestr("notes.txt", "")
    assert wheels.machine_paths(wheel, tmp_path) == [f"adamix_kernels/__init__.py: {tmp_path}"]
    wrong = wheels.unexpected(wheel, supply_chain.ROOT)
    assert {"+ notes.txt", "- adamix_kernels/_version.py"} <= set(wrong)
