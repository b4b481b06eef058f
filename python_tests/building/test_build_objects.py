"""Which files are compiled, how many at a time, by ninja or without it, and what a failure leaves behind."""

import os

import pytest

from adamix_kernels._build import BuildError, objects, schedule


@pytest.fixture(params=["ninja", "threads"])
def compilers_run_by(request, monkeypatch):
    """ninja, or the threads that take its place where it is not installed."""
    if request.param == "threads":
        monkeypatch.setattr(schedule, "find_ninja", lambda: None)
    elif schedule.find_ninja() is None:
        pytest.skip("ninja is not installed")
    return request.param


def _small_csrc(folder):
    (folder / "op").mkdir(parents=True)
    (folder / "a.h").write_text('#include "b.h"\n')
    (folder / "b.h").write_text("int b();\n")
    (folder / "op/one.cpp").write_text('#include "a.h"\nint one() { return 1; }\n')
    (folder / "op/two.cpp").write_text("int two() { return 2; }\n")
    return folder


def _planned(csrc, kept, *flags):
    kept.mkdir(exist_ok=True)
    found = [(source, objects.with_includes(source, csrc)) for source in objects.sources(csrc)]
    return [objects.planned(["g++"], ["-c", f"-I{csrc}", *flags], each, read, kept, ("1",)) for each, read in found]


def test_only_what_changed_is_compiled_again(tmp_path, compilers_run_by, capsys):
    csrc, kept = _small_csrc(tmp_path / "a csrc: $it's"), tmp_path / "objects $1: 'kept'"

    def compile_all(*flags):
        made = schedule.compile_all(_planned(csrc, kept, *flags), 2)
        assert len(list(kept.glob("*.o"))) == len(list(kept.glob("*.log"))) == 2
        assert not list(kept.glob("*.part"))
        return [(each.object, each.object.stat().st_mtime_ns) for each in made]

    one, two = compile_all()
    told = capsys.readouterr().err
    assert "compiling 2 of 2 files, 2 at a time" in told
    assert (", by ninja" in told) == (compilers_run_by == "ninja")
    assert {"[1/2]", "[2/2]"} <= set(told.split())
    assert compile_all() == [one, two]
    assert capsys.readouterr().err == ""
    (csrc / "b.h").write_text("int b(int);\n")
    changed, same = compile_all()
    assert "compiling 1 of 2 files" in capsys.readouterr().err
    assert changed[0] != one[0]
    assert same == two
    assert {path for path, _ in compile_all("-O2")}.isdisjoint({changed[0], two[0]})


def test_what_fails_says_why_and_leaves_no_object(tmp_path, compilers_run_by):
    csrc = _small_csrc(tmp_path / "csrc")
    (csrc / "op/two.cpp").write_text("int two() { return nobody; }\n#warning a warning\n")
    with pytest.raises(BuildError, match=r"nobody.* was not declared"):
        schedule.compile_all(_planned(csrc, tmp_path / "objects"), 1)
    left = {path.name.rpartition("-")[0] for path in (tmp_path / "objects").glob("*.o*")}
    assert left <= {"op-one.cpp"}
    (csrc / "op/two.cpp").write_text("int two() { return 2; }\n#warning a warning\n")
    made = schedule.compile_all(_planned(csrc, tmp_path / "objects"), 1)
    assert "a warning" in made[1].log


def test_max_jobs_is_honoured(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert schedule.parallel() == 3
    assert schedule.parallel(2) == 2
    monkeypatch.setenv("MAX_JOBS", "")
    assert schedule.parallel() == schedule.processors() >= 1
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(BuildError, match=f"MAX_JOBS: got '{wrong}', expected a whole number above 0"):
            schedule.parallel()


def test_max_jobs_reaches_ninja(tmp_path, monkeypatch):
    """A ninja that writes down how it was called."""
    fake = tmp_path / "bin/ninja"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/called"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MAX_JOBS", "5")
    kept = tmp_path / "objects"
    schedule.compile_all(_planned(_small_csrc(tmp_path / "csrc"), kept), schedule.parallel())
    assert (tmp_path / "called").read_text().split() == ["-C", str(kept), "-j", "5"]
    assert (kept / "build.ninja").read_text().count(": compile ") == 2


def test_a_failed_build_leaves_the_old_file_and_no_other(tmp_path):
    output = tmp_path / "x.so"
    output.write_text("old")
    with pytest.raises(BuildError, match=r"status \d+ from\n.*g\+\+"):
        objects.link(["g++", "-shared"], [objects.Compiled(output, tmp_path / "none.o")], [], output)
    assert output.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.so"]


def test_no_job_is_not_a_number_of_jobs(capsys):
    from adamix_kernels._build.__main__ import main

    with pytest.raises(SystemExit):
        main(["--jobs", "0"])
    assert "--jobs: got 0, expected at least 1" in capsys.readouterr().err
