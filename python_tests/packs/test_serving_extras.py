"""The examples of serving where an extra is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "missing", "extra"),
    [
        ("serving/fastapi_app.py", "fastapi", "serve"),
        ("serving/fastapi_app.py", "uvicorn", "serve"),
        ("serving/ray_app.py", "ray", "ray"),
        ("cluster/many_runs.py", "ray", "ray"),
    ],
)
def test_a_missing_extra_is_named_in_a_line(script, missing, extra, tmp_path):
    runs = tmp_path / "runs.txt"
    runs.write_text("adamix env\n")
    given = [str(runs), "--ray", "http://127.0.0.1:1"] if "many_runs" in script else ["--pack", str(tmp_path)]
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
    command = [sys.executable, "-c", code + 'run_name="__main__")', str(EXAMPLES / script), *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    found = line.partition(":")[0]
    assert found.partition(".")[0] in (missing, "uvicorn")
    assert line.endswith(f": not installed, expected the extra: pip install 'adamix_kernels[{extra}]'")
