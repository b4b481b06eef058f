"""A package of an extra that is missing is answered with the line that installs it, wherever it is asked for."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_csrc
from packaging.requirements import Requirement

import adamix_kernels
from adamix_kernels import _extras
from adamix_kernels.recipes import libraries
from adamix_kernels.reports import figures

ROOT = Path(__file__).parents[2]
# Runs pieces of code where packages are absent, each as if alone, and prints how each ended.
APART = """
import contextlib, importlib.abc, importlib.util, io, json, sys
absent, pieces = {absent!r}, {pieces!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in absent else found(name, package)
for code in pieces:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = exec(code, {{"__name__": "__apart__"}})
        except SystemExit as error:
            status = error.code
        except Exception as error:
            status = f"{{type(error).__name__}}: {{error}}"
    print("ENDED " + json.dumps([status, said.getvalue()]))
"""


def _apart(*pieces, absent=tuple(_extras.PACKAGES)):
    """[how it ended: None, an exit status or an error; its stderr] of each piece."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    text = APART.format(absent=set(absent), pieces=pieces)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(words) for words in re.findall("^ENDED (.*)$", done.stdout, re.MULTILINE)]


def _extra(text, name):
    """The names of an extra's requirements, those of the extras it names included."""
    (words,) = re.findall(rf"^{name} = (\[.*\])$", text, re.MULTILINE)
    found = set()
    for requirement in map(Requirement, ast.literal_eval(words)):
        if requirement.name == "adamix_kernels":
            for each in requirement.extras:
                found |= _extra(text, each)
        else:
            found.add(requirement.name)
    return found


def test_each_package_is_in_the_extra_that_is_named():
    text = (ROOT / "pyproject.toml").read_text()
    for package, extra in _extras.PACKAGES.values():
        assert package in _extra(text, extra), (package, extra)
        smaller = _extras._ORDER[: _extras._ORDER.index(extra)]
        assert not [each for each in smaller if package in _extra(text, each)]
    for smaller, larger in (("hf", "train"), ("train", "demo"), ("train", "recipes")):
        assert _extra(text, smaller) < _extra(text, larger)


def test_a_base_installation_works_and_says_how_to_install_what_a_name_or_a_command_needs():
    command = "import sys; from adamix_kernels.cli import main; sys.exit(main({}))"
    recipe, star, named, function, data, encoder, save, train, help_, demo, again = _apart(
        command.format(["recipe", "list"]),
        "from adamix_kernels import *; (AdaMixConfig, adapt, merge, routed_lora)",
        "import adamix_kernels as a; assert 'AdaMixTrainer' in dir(a) and hasattr(a, 'adapt'); a.AdaMixTrainer",
        "from adamix_kernels.reports import TrainingReport",
        "from adamix_kernels.tasks import load_task as load; load('some/set')",
        "from adamix_kernels.tasks import resolve_model; resolve_model()",
        "import torch; from pathlib import Path; from adamix_kernels.models._files import _save_tensors as save\n"
        "save(Path('x'), {'a': torch.ones(1)})",
        command.format(["train"]),
        command.format(["train", "--help"]),
        "import runpy; runpy.run_module('adamix_kernels.demo', run_name='__main__')",
        "from adamix_kernels import *; adapt",
    )
    assert star == again == [None, ""]
    told = "ModuleNotFoundError: {} needs the package {}, which is not installed: {}"
    assert named[0] == told.format("AdaMixTrainer", "transformers", _extras.install_line("hf"))
    assert function[0] == told.format("TrainingReport", "transformers", _extras.install_line("hf"))
    assert save[0] == told.format("saving", "safetensors", _extras.install_line("hf"))
    for error, extra in ((data, "train"), (encoder, "demo")):
        assert error[0].startswith("ModuleNotFoundError: ")
        assert _extras.install_line(extra) in error[0]
    for command, extra in ((train, "train"), (help_, "train"), (recipe, "recipes"), (demo, "demo")):
        (line,) = command[1].strip().splitlines()
        assert command[0] == 2
        assert line.endswith(f"is not installed: {_extras.install_line(extra)}")


def test_what_loads_a_model_says_it_too(tmp_path):
    tasks = "from adamix_kernels.tasks import load_causal, load_classifier, resolve_model as r; "
    classifier, causal, folder, *repositories = _apart(
        tasks + "load_classifier(r('x'), ['a', 'b'])",
        tasks + "load_causal(r('x'))",
        f"from adamix_kernels import load; load({str(tmp_path)!r})",
        "from adamix_kernels import load; load('some/repository')",
        "import torch, adamix_kernels as a; a.load_adamix(torch.nn.Linear(2, 2), 'some/repository')",
        absent=(*_extras.PACKAGES, "huggingface_hub"),
    )
    told = "ModuleNotFoundError: {} needs the package {}, which is not installed: {}"
    for (error, _), what in ((classifier, "load_classifier"), (causal, "load_causal"), (folder, "load")):
        assert error == told.format(what, "transformers", _extras.install_line("hf"))
    for (error, _), what in zip(repositories, ("source", "directory"), strict=True):
        assert error.startswith(f"ModuleNotFoundError: {what}: 'some/repository', which is no folder here, needs the ")
        assert error.endswith(f"package huggingface_hub: {_extras.install_line('hf')}")


@pytest.mark.parametrize(
    ("module", "what", "extra", "call"),
    [
        ("matplotlib", "drawing", "train", figures.pyplot),
        ("peft", "PEFT's LoRA", "recipes", lambda: libraries.lora(None, None, {}, None)),
        ("peft", "prefix tuning", "recipes", lambda: libraries.prefix(None, None, {})),
    ],
)
def test_a_part_that_is_missing_is_named_where_the_rest_is_there(monkeypatch, module, what, extra, call):
    monkeypatch.setitem(sys.modules, module, None)
    words = f"{what} needs the package {module}, which is not installed: {_extras.install_line(extra)}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(words)):
        call()


def test_no_sentence_names_an_index_that_has_no_such_package():
    files = [*(ROOT / "adamix_kernels").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert [path for path in files if re.search(r"pip install '?adamix_kernels", path.read_text())] == []


def _recorded(monkeypatch, direct_url, installer="pip"):
    monkeypatch.setattr(_extras, "_recorded", lambda: direct_url | {"installer": installer})


def test_the_line_names_what_was_installed_from(monkeypatch, tmp_path):
    _recorded(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(_extras.install_line("train")) == ["pip", "install", "-e", f"{ROOT}[train]"]
    _recorded(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {}}, installer="uv")
    assert shlex.split(_extras.install_line("hf")) == ["uv", "pip", "install", f"{ROOT}[hf]"]
    _recorded(monkeypatch, {"url": "https://a.example/b", "vcs_info": {"vcs": "git", "commit_id": "12ab"}})
    assert _extras.install_line("demo") == "pip install 'adamix_kernels[demo] @ git+https://a.example/b@12ab'"
    wheel = tmp_path / "a wheel.whl"
    wheel.touch()
    _recorded(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(_extras.install_line("train"))[-1] == f"adamix_kernels[train] @ {wheel.as_uri()}"
    # What is no longer there is not named.
    wheel.unlink()
    told = "pip install '.[train]' in the folder of adamix_kernels' sources"
    monkeypatch.setattr(_extras, "__file__", str(tmp_path / "site-packages/adamix_kernels/_extras.py"))
    for gone in ({"url": wheel.as_uri(), "archive_info": {}}, {"url": tmp_path.as_uri(), "dir_info": {}}, {}):
        _recorded(monkeypatch, gone)
        assert _extras.install_line("train") == told


def test_an_import_error_of_something_else_is_left_alone(monkeypatch):
    ours = ModuleNotFoundError("No module named 'adamix_kernels.nothing'", name="adamix_kernels.nothing")
    assert _extras.explained(ours) is ours
    # transformers is there, and something inside it is not.
    monkeypatch.setattr(_extras, "installed", lambda module: module == "transformers")
    inside = ModuleNotFoundError("Could not import module 'Trainer'", name="transformers.trainer")
    assert _extras.explained(inside) is inside
    with pytest.raises(ModuleNotFoundError, match=r"adamix_kernels\.nothing"), _extras.needed():
        raise ours
    told = _extras.explained(ModuleNotFoundError("No module named 'sklearn.metrics'", name="sklearn.metrics"))
    assert str(told).startswith("the package scikit-learn is not installed: ")


def test_a_type_checker_sees_every_name_that_is_imported_late():
    tree = ast.parse((ROOT / "adamix_kernels/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == adamix_kernels._LAZY
    assert set(adamix_kernels._NEEDS_TRANSFORMERS) <= set(seen)


def test_metadata_and_files_of_an_sdist(tmp_path):
    """py.typed, the versions and the extras; no address is made up."""
    code = (
        "from setuptools import build_meta as b;"
        f"print(b.build_sdist({str(tmp_path)!r})); print(b.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    )
    environment = os.environ | {"ADAMIX_CUDA": "0", "PYTHONPATH": ""}
    (tmp_path / "project").mkdir()
    project = tiny_csrc.project(tmp_path / "project")
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive, metadata = [line for line in done.stdout.splitlines() if line.endswith((".tar.gz", ".dist-info"))]
    with tarfile.open(tmp_path / archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"adamix_kernels/py.typed", "csrc/doubling/doubling.cu", "setup.py", "pyproject.toml"} <= names
    text = (tmp_path / metadata / "METADATA").read_text()
    fields = re.findall(r"^([A-Z][\w-]+): (.*)$", text.partition("\n\n")[0], re.MULTILINE)
    assert ("Version", adamix_kernels.__version__) in fields
    assert ("Author", "The adamix_kernels developers") in fields
    assert ("Classifier", "Typing :: Typed") in fields
    assert {"torch>=2.6", "numpy>=1.26"} <= {value for name, value in fields if name == "Requires-Dist"}
    assert not [value for name, value in fields if name in ("Project-URL", "Home-page")]
    assert json.dumps(adamix_kernels.__version__) in (project / "adamix_kernels/_version.py").read_text()
