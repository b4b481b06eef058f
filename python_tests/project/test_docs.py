"""The documentation site: it builds without a warning, every link leads somewhere, every public name is described."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamix_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_public_name_is_described(site):
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in adamix_kernels.__all__:
        if name == "__version__":
            continue
        assert inspect.getdoc(getattr(adamix_kernels, name)), name
        section = page.partition(f'id="adamix_kernels.{name}"')[2].partition("<h3 ")[0]
        assert "Example" in section, f"docs/reference.md: {name} is missing, or its example"
    for name in ("compat.ExpertSoup", "compat.AdamixMergedLinear", "tasks.load_task", "AdaMixConfig.from_peft"):
        assert f'id="adamix_kernels.{name}"' in page, name


def test_arguments_become_lists(site):
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    section = page.partition('id="adamix_kernels.double_batch"')[2].partition("<h3 ")[0]
    words = re.sub(r"<[^>]+>|\s+", " ", section)
    assert re.search(r"Parameters: .*inputs .*batch_size .*Raises: .*ValueError", re.sub(" +", " ", words))


def test_what_is_returned_is_one_item_however_many_lines_it_takes(site):
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("routed_adapter", "routed_lora", "adamix_loss"):
        section = page.partition(f'id="adamix_kernels.{name}"')[2].partition("<h3 ")[0]
        returned = section.partition("Returns:")[2].partition("</ul>")[0]
        assert returned.count("<li") == 1, (name, returned)


def test_the_home_page_installs_as_the_readme_does(site):
    page = re.sub(r"<[^>]+>", "", (site / "index.html").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install\n")[2]
    first = readme.partition("```sh\n")[2].partition("\n")[0]
    assert first
    assert first in page.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_files_outside_the_site_are_named(site):
    page = (site / "counts" / "index.html").read_text(encoding="utf-8")
    assert "benchmarks/results/count.csv" in page
    assert "../benchmarks/results" not in page
    assert not (site / "upstream").exists()
