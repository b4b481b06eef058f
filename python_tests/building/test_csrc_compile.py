"""csrc/ compiled for every GPU without one: the committed table, its limits, and that compiling gives it again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from suite_size import NIGHTLY

from adamix_kernels import _build
from benchmarks.cuda_compile import compile as cuda_compile
from benchmarks.cuda_compile import volta_compiler
from benchmarks.cuda_compile.__main__ import main
from benchmarks.cuda_compile.table import SHAPES, TABLE, Row, differences, problems, read, write

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = [path for path in _build.sources(CSRC) if path.suffix == ".cu"]
ROWS = read(TABLE)
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
# Kernels of the routed ops that multiply no matrices.
WITHOUT_PRODUCTS = {"routed_adapter_pass_sum_kernel", "routed_lora_pass_sum_kernel"}
GOOD = Row("a_kernel<half 16>", 90, 90, 0, 0, 0, 0, "HMMA.16816.F32", 128, "a/a.cu", "0123", "nvcc 13.0.88")


def _missing():
    try:
        _build.find_nvcc()
        cuda_compile.nvrtc_version(cuda_compile.WHEELS)
        cuda_compile.cuobjdump()
    except _build.BuildError as error:
        return str(error)
    return None


needs_compilers = pytest.mark.skipif(_missing() is not None, reason=f"not compiled: {_missing()}")


def test_the_table_breaks_no_limit():
    assert problems(ROWS) == []
    assert all(row.registers > 0 for row in ROWS)


def test_the_table_holds_every_kernel_for_every_target():
    written = {
        name
        for path in CSRC.rglob("*")
        if path.is_file() and path.parent.name != "host"
        for name in KERNEL.findall(path.read_text())
    }
    assert written
    assert {row.name for row in ROWS} == written
    kernels = {(row.file, row.kernel) for row in ROWS}
    assert {row.key for row in ROWS} == {(*kernel, target) for kernel in kernels for target in SHAPES}


def test_the_table_is_of_these_sources():
    of_kernels = [path for path in SOURCES if "__global__" in path.read_text()]
    now = {str(path.relative_to(CSRC)): cuda_compile.source_fingerprint(path, CSRC) for path in of_kernels}
    assert {row.file: row.source for row in ROWS} == now, "python -m benchmarks.cuda_compile --write"


def test_routed_kernels_multiply_on_matrix_units_with_asynchronous_copies():
    # A V100's alone is empty from sm_75 on.
    held = {row.target: row for row in ROWS if row.name == "routed_adapter_held_forward_kernel"}
    assert {target for target, row in held.items() if row.mma} == {70}
    assert not any(row.async_copy for row in held.values())
    routed = [row for row in ROWS if row.file.startswith("routed_") and row.dtype != "float32"]
    routed = [row for row in routed if row not in held.values()]
    assert {row.name for row in routed if row.target >= 80 and not row.mma} == WITHOUT_PRODUCTS
    products = [row for row in routed if row.name not in WITHOUT_PRODUCTS]
    assert {row.file.partition("/")[0] for row in products} == {"routed_adapter", "routed_lora"}
    for row in products:
        # Those of newer GPUs, whose rows go straight into registers, are empty on sm_70, which launches the others.
        straight = "_mma_" in row.name or "_resident_" in row.name
        newer = straight or "_one_pass_" in row.name
        first = (75 if row.dtype == "float16" else 80) if newer else (70 if row.dtype == "float16" else 80)
        assert bool(row.mma) == (row.target >= first), row
        assert row.async_copy == (128 if row.target >= 80 and not straight else 0), row


@pytest.mark.nightly
@needs_compilers
def test_compiling_gives_the_table_and_a_library_that_loads_here():
    """By day the table's fingerprints say that it was compiled from these sources, and NVRTC compiles some of them."""
    architectures = cuda_compile.ARCHITECTURES
    rows = cuda_compile.compiled(architectures=architectures)
    assert problems(rows) == []
    assert {row.target for row in rows} == set(SHAPES)
    assert differences(ROWS, rows) == []
    record = json.loads((cuda_compile.LIBRARY.parent / _build.RECORD).read_text())
    assert record["architectures"] == list(architectures)
    code = (
        f"import torch; torch.ops.load_library({str(cuda_compile.LIBRARY)!r});"
        "print(torch.ops.adamix_cuda.build_info());"
        "print(*(s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith('adamix_cuda::')))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ADAMIX")} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built_for, names = done.stdout.splitlines()
    assert built_for.split(";") == record["architectures"]
    symbols = subprocess.run(
        ["nm", "-D", "-u", cuda_compile.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_" in symbols
    assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w*|\bPy\w+", symbols), "outside torch's stable ABI"
    declared = re.findall(r'm\.def\(\s*"(\w+)', (CSRC / "registration.cpp").read_text())
    assert {f"adamix_cuda::{name}" for name in declared} == set(names.split())


@needs_compilers
def test_what_a_kernel_may_overwrite_is_not_loaded_as_read_only():
    """Losses write gradients in the place of their logits, which LDG.CONSTANT may then read as they were."""
    only = () if NIGHTLY else ("consistency_bwd.cu", "routed_adapter_fwd.cu")  # the forward takes a minute
    made = cuda_compile.compile_nvrtc(CSRC, cuda_compile.WHEELS, 2, only)
    objects = {each.source.name: each.object for each in made}

    def read_only_loads(name):
        command = [cuda_compile.cuobjdump(), "-sass", objects[name]]
        return re.findall(r"LDG[.\w]*CONSTANT", subprocess.run(command, capture_output=True, text=True).stdout)

    losses = [name for name in objects if name.startswith("consistency_")]
    assert len(losses) == (2 if NIGHTLY else 1)
    assert [read_only_loads(name) for name in losses] == [[]] * len(losses)
    assert read_only_loads("routed_adapter_fwd.cu")  # of x and the banks, which it only reads


def test_make_oldest_loads_the_library_that_is_compiled_here():
    assert f"LIBRARY := {cuda_compile.LIBRARY.relative_to(ROOT)}\n" in (ROOT / "Makefile").read_text()


@needs_compilers
def test_a_warning_for_sm_70_is_an_error(tmp_path):
    (tmp_path / "op").mkdir()
    (tmp_path / "op/one.cu").write_text("__global__ void k(int* p) { int unused; *p = 1; }\n")
    with pytest.raises(_build.BuildError, match=r'variable "unused" was declared but never referenced'):
        cuda_compile.compile_nvrtc(tmp_path, cuda_compile.WHEELS, 1)


@needs_compilers
def test_an_object_of_ptx_for_the_v100_alone(tmp_path):
    source, output = tmp_path / "one.cu", tmp_path / "one.o"
    source.write_text("""
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 0
#endif
template <typename T>
__global__ void k(T* p) { *p = __CUDA_ARCH__; }
template __global__ void k(int*);
#ifndef __CUDACC_RTC__
void launch(int* p) { k<<<1, 1>>>(p); }
#endif
""")
    command = ["--nvcc", str(_build.find_nvcc().path), "--wheels", str(cuda_compile.WHEELS)]
    assert volta_compiler.main([*command, "-c", "-O3", str(source), "-o", str(output)]) == 0
    tool = cuda_compile.cuobjdump()
    listed = subprocess.run([tool, "-lelf", "-lptx", output], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"sm_\d+\.\w+", listed) == ["sm_70.ptx"]
    text = subprocess.run([tool, "-ptx", output], capture_output=True, text=True, check=True).stdout
    assert ".target sm_70" in text
    (entry,) = re.findall(r"\.entry (\w+)", text)
    # The name under which the host's part registers the kernel.
    assert entry.encode() + b"\0" in output.read_bytes()
    assert re.search(r"mov\.(?:b32|u32)\s+%r\d+, 700;", text)

    source.write_text("__global__ void k(int* p) { *p = nobody; }\n")
    output.unlink()
    assert volta_compiler.main([*command, "-c", str(source), "-o", str(output)]) == 1
    assert not output.exists()


@needs_compilers
def test_a_wrong_compiler_is_named(tmp_path, capsys):
    assert main(["--nvrtc", str(tmp_path)]) == 2
    assert f"no NVRTC in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(spill_stores=4), "4 B of spill stores"),
        (dict(spill_loads=8), "8 B of spill loads"),
        (dict(shared_bytes=49_153), "49153 B of static shared memory"),
        (dict(mma=""), "no matrix instruction, HMMA.16816 is expected"),
        (dict(mma="HMMA.1688.F32+HMMA.16816.F32"), "HMMA.1688.F32"),
        (dict(target=75), "HMMA.16816.F32, HMMA.1688 is expected"),
        (dict(target=70, mma=""), "HMMA.884 is expected"),
    ],
)
def test_a_broken_limit_is_named(change, words):
    float32 = replace(GOOD, kernel="a_kernel<float 16>", mma="")
    old = replace(GOOD, kernel="a_kernel<bfloat16 16>", mma="", target=75)
    assert problems([GOOD, float32, old, replace(GOOD, target=75, mma="HMMA.1688.F32")]) == []
    (found,) = problems([GOOD, replace(GOOD, **change)])
    assert words in found
    assert "a_kernel<half 16> on sm_" in found


def test_what_keeps_to_128_registers_may_spill_a_little_on_new_gpus():
    row = replace(GOOD, kernel="routed_lora_input_grad_mma_kernel<half 2>", target=100, spill_stores=60, spill_loads=96)
    assert problems([row]) == []
    assert "64 B of spill stores" in problems([replace(row, spill_stores=64)])[0]
    assert "60 B of spill stores" in problems([replace(row, target=90)])[0]
    assert "60 B of spill stores" in problems([replace(row, kernel="a_kernel<half 2>")])[0]


def test_some_kernels_may_spill_a_little():
    kernel = "routed_adapter_one_pass_kernel<half true>"
    assert problems([replace(GOOD, kernel=kernel, spill_stores=88, spill_loads=128)]) == []
    (found,) = problems([replace(GOOD, kernel=kernel, spill_loads=129)])
    assert "129 B of spill loads" in found


def test_a_row_too_many_too_few_or_stale_is_named():
    other = replace(GOOD, target=80)
    assert differences([GOOD, other], [other, GOOD]) == []
    assert "no such kernel" in differences([GOOD, other], [GOOD])[0]
    assert "not in the table" in differences([GOOD], [GOOD, other])[0]
    assert "two rows" in differences([GOOD, GOOD], [GOOD])[0]
    assert "source has changed" in differences([GOOD], [replace(GOOD, source="4567")])[0]
    assert "registers 91, the table has 90" in differences([GOOD], [replace(GOOD, registers=91)])[0]
    assert differences([GOOD], [replace(GOOD, registers=91, compiler="nvcc 13.1.20")]) == []


def test_rows_survive_the_csv(tmp_path):
    rows = [replace(GOOD, target=70, mma="", kernel="b_kernel"), GOOD]
    write(tmp_path / "t.csv", rows)
    assert read(tmp_path / "t.csv") == [GOOD, rows[0]]
    (tmp_path / "bad.csv").write_text("kernel,target\n")
    with pytest.raises(ValueError, match="got columns"):
        read(tmp_path / "bad.csv")


def test_what_ptxas_says_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 368 bytes cmem[0]
ptxas info    : Function properties for helper
    16 bytes stack frame, 1 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z1bv' for 'sm_70'
ptxas info    : Function properties for _Z1bv
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
"""
    a, b = cuda_compile.parsed(log)
    assert (a.kernel, a.target, a.registers, a.spill_stores, a.spill_loads) == ("_Z1av", 90, 40, 5, 12)
    assert (a.stack_bytes, a.shared_bytes) == (24, 512)
    assert (b.kernel, b.target, b.registers, b.spill_stores, b.shared_bytes) == ("_Z1bv", 70, 8, 0, 0)


def test_matrix_instructions_and_copies_are_read():
    sass = """	code for sm_70
		Function : one
        /*0220*/   HMMA.884.F32.F32.STEP0 R24, R4.reuse.ROW, R8.reuse.COL, RZ ;
        /*0230*/   @P0 HMMA.884.F32.F32.STEP1 R26, R4.reuse.ROW, R8.reuse.COL, RZ ;
	code for sm_80
		Function : one
        /*0100*/   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;
        /*0110*/   LDGSTS.E [R5], [R2.64] ;
        /*0220*/   HMMA.16816.F32.BF16 R4, R8, R16, RZ ;
        /*0220*/   HMMA.16816.F32 R4, R8, R16, RZ ;
		Function : two
        /*0000*/   FFMA R1, R2, R3, R4 ;
"""
    assert cuda_compile.disassembled(sass) == {
        ("one", 70): ("HMMA.884.F32.F32", 0),
        ("one", 80): ("HMMA.16816.F32+HMMA.16816.F32.BF16", 128),
        ("two", 80): ("", 0),
    }


def test_kernels_are_called_as_they_are_written():
    mangled = "_ZN6adamix1kI6__halfLNS_5InnerE0ELi16ELb1EEEvNS_1PIT_EE"
    assert cuda_compile.demangled([mangled, "plain"]) == {mangled: "k<half Inner:0 16 true>", "plain": "plain"}


def test_the_fingerprint_is_of_code_and_not_of_its_comments():
    code = cuda_compile.code_alone
    assert code('int a;  // one\n/* two\n */\n  const char* b = "// no";\n') == code('int a;\nconst char* b = "// no";')
    assert code("int a;") != code("int b;")
    assert code('f("// a")') != code('f("// b")')
