"""examples/cluster/many_runs.py: a command a line, shared by an array's elements, or as Ray jobs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def many(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "cluster"), *sys.path])
    monkeypatch.chdir(tmp_path)
    for variables in ("SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ARRAY_INDEX"):
        monkeypatch.delenv(variables, raising=False)
    import many_runs

    return many_runs


def slurm(*values):
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, values, strict=True)}


def write(count, fails=()):
    """A file of `count` commands that each note that they ran; those of `fails` then fail."""
    lines = ["# names", ""]
    for n in range(count):
        end = "raise SystemExit(3)" if n in fails else "print('well')"
        lines.append(f"python -c \"open('ran','a').write('{n} '); {end}\"  # number {n}")
    Path("runs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ran():
    return sorted(map(int, Path("ran").read_text().split())) if Path("ran").exists() else []


def test_the_elements_of_an_array_share_the_lines(many, monkeypatch, capsys):
    write(5)
    assert many.main(["runs.txt", "--array-index", "1", "--array-size", "2"]) == 0
    assert ran() == [1, 3]
    assert "2 of 5 lines" in capsys.readouterr().out
    for key, value in {"ID": "12", "COUNT": "2", "MIN": "12"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    assert many.main(["runs.txt"]) == 0
    assert ran() == [0, 1, 2, 3, 4]
    assert [many.share(range(5), None, None, slurm(at, 3, 0, 4, 2)) for at in (0, 2, 4)] == [
        range(0, 5, 3), range(1, 5, 3), range(2, 5, 3),
    ]  # fmt: skip
    for at in (1, 4, 9):  # --array=1,4,9, which Slurm calls a step of 1
        with pytest.raises(ValueError, match="array: got 3 indices from 1 to 9 by 1, expected all between them"):
            many.share(range(5), None, None, slurm(at, 3, 1, 9, 1))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert many.main(["runs.txt"]) == 0  # no array: all lines, which are done
    assert ran() == [0, 1, 2, 3, 4]
    monkeypatch.setenv("AWS_BATCH_JOB_ARRAY_INDEX", "7")
    monkeypatch.setenv("AWS_BATCH_JOB_ARRAY_SIZE", "9")
    assert many.main(["runs.txt"]) == 0  # more elements than lines
    assert "0 of 5 lines" in capsys.readouterr().out
    for words in (["--array-index", "2", "--array-size", "2"], ["--array-index", "1"], ["--array-size", "3"]):
        with pytest.raises(SystemExit):
            many.main(["runs.txt", *words])
        assert "array: got index" in capsys.readouterr().err


def test_what_failed_is_told_and_run_again(many, capsys):
    write(3, fails=[1])
    assert many.main(["runs.txt"]) == 1
    assert ran() == [0, 1, 2]
    said = capsys.readouterr().out
    assert "line 4: exit status 3" in said
    assert "failed: line 4" in said
    logs = {path.read_text() for path in Path("runs.txt.state").glob("*.log")}
    assert logs == {"", "well\n"}
    assert many.main(["runs.txt"]) == 1
    assert ran() == [0, 1, 1, 2]
    write(4)  # line 4 is another command now, and one more came
    assert many.main(["runs.txt"]) == 0
    assert ran() == [0, 1, 1, 1, 2, 3]


def test_a_training_that_was_stopped_goes_on(many):
    lines = ["adamix train --data d --out runs/a", "adamix train --out=runs/b --resume", "adamix merge --out runs/a"]
    Path("runs.txt").write_text("\n".join(lines))
    first, *others = many.read(Path("runs.txt"))
    log = Path("log")
    Path("runs/a/checkpoint-8").mkdir(parents=True)
    Path("runs/b/checkpoint-8").mkdir(parents=True)
    assert many.resumed(first, log) == []  # somebody else's checkpoint
    log.write_text("begun")
    assert many.resumed(first, log) == ["--resume"]
    assert [many.resumed(line, log) for line in others] == [[], []]
    for number, words in enumerate(("", " --output_dir runs/c", " --output-dir=runs/d")):
        Path(("adamix_out", "runs/c", "runs/d")[number], "checkpoint-8").mkdir(parents=True)
        assert many.resumed(many.Line(1, f"adamix train{words}".split(), Path("s")), log) == ["--resume"]
    Path("runs/a/checkpoint-8").rmdir()
    assert many.resumed(first, log) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got no command"), ("rm -r x", "runs.txt:1: got 'rm', expected a command of adamix or python"),
        ("adamix 'train", "runs.txt:1: got"),
        ("adamix env\n\nadamix  env", "runs.txt:3: got the command of line 1 again"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(text, told, many, capsys):
    Path("runs.txt").write_text(text)
    with pytest.raises(SystemExit):
        many.main(["runs.txt"])
    assert told in capsys.readouterr().err
    assert not Path("runs.txt.state").exists()


@pytest.mark.nightly
def test_two_names_are_trained_and_packed(many, tmp_path):
    import tiny_text

    encoder = tiny_text.write_encoder(tmp_path / "encoder")
    text = [
        f"adamix train --data remarks --model {encoder} --max_train_rows 8 --num_train_epochs 1 --out {n}" for n in "ab"
    ]
    Path("runs.txt").write_text("\n".join(text))
    for index in "01":
        assert many.main(["runs.txt", "--array-index", index, "--array-size", "2"]) == 0
    words = [sys.executable, "-m", "adamix_kernels", "pack", "one=a", "two=b", "--out", "pack"]
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert Path("pack/adamix_pack.json").is_file()


def test_lines_as_ray_jobs(many, capsys):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'adamix_kernels[ray]'")
    pytest.importorskip("ray.job_submission", reason="ray's jobs are not installed: pip install 'adamix_kernels[ray]'")
    found = ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False)
    try:
        write(3, fails=[2])
        assert many.main(["runs.txt", "--ray", f"http://{found.dashboard_url}"]) == 1
        said = capsys.readouterr().out
        assert [said.count(word) for word in ("succeeded", "failed")] == [2, 1]
        assert ran() == [0, 1, 2]
        write(4)
        assert many.main(["runs.txt", "--ray", f"http://{found.dashboard_url}"]) == 0
        assert ran() == [0, 1, 2, 2, 3]
    finally:
        ray.shutdown()
        assert not os.environ.get("RAY_ADDRESS")
