"""Counts: loops and functions of machine code, matched with those of the PTX."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.count import loops as count_loops
from benchmarks.count import sass as count_sass

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
	//## File "/x/a.py", line 3
        /*0010*/              @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
	//## File "/x/a.py", line 4
        /*0030*/                   FADD R4, R4, R8 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   MUFU.EX2 R6, R6 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


def test_machine_code_is_read():
    code = count_sass.parsed(SASS, 40)
    assert [one.opcode for one in code.instructions][-2:] == ["BRA", "EXIT"]
    assert code.instructions[1].source == "a.py:3"
    (loop,) = count_sass.sass_loops(code)
    assert (loop.first, loop.body, loop.own) == (1, tuple(range(1, 8)), tuple(range(1, 8)))
    # Both loads are under way when the first is used: 2 * 16 bytes of 32 lanes.
    assert count_sass.in_flight(code, loop.own) == 1024
    serial = count_sass.parsed(SASS.replace("LDG.E.128 R8", "FMUL R4, R4, R4 ;\n/*0021*/ LDG.E.128 R8"), 40)
    assert count_sass.in_flight(serial, count_sass.sass_loops(serial)[0].own) == 512
    # A generic load is another instruction.
    generic = count_sass.parsed(SASS.replace("LDG.E.128 R8", "LD.E.128 R8"), 40)
    assert [count_sass.in_flight(generic, loop.own, kinds) for kinds in ({"LDG"}, {"LDG", "LD"})] == [512, 1024]


def test_loops_within_loops():
    outer, inner = count_loops.loops(10, {8: ([1], True), 5: ([3], True), 9: ([], False)})
    assert (outer.first, outer.own) == (1, (1, 2, 6, 7, 8))
    assert (inner.body, inner.own) == ((3, 4, 5), (3, 4, 5))


def test_a_loop_whose_parts_lie_apart():
    """1 2 3 -> 8 9 -> 1; what lies between runs once, after 3."""
    jumps = {3: ([8], True), 7: ([], False), 9: ([1], False)}
    (loop,) = count_loops.loops(10, jumps)
    assert loop.own == (1, 2, 3, 8, 9)


def test_an_unrolled_loop_is_told_by_what_it_loads():
    """The machine code's loop has two loads and two exponentials, the PTX's one: two iterations in one."""
    code = count_sass.parsed(SASS, 40)
    names = ["mov.b32", "ld.global", "add.f32", "ex2.approx.f32", "bar", "bra", "ret"]
    sources = ["", "a.py:3", "a.py:4", "a.py:4", "a.py:4", "a.py:4", ""]
    outside, inside = count_sass.parts(names, sources, count_loops.loops(7, {5: ([1], True), 6: ([], False)}), code)
    assert inside.unrolled == 2
    assert inside.ratio == pytest.approx(7 / 2 / 5)
    assert (outside.ptx, len(outside.sass)) == ((0, 6), 2)


@pytest.mark.parametrize(
    ("shape", "products", "loads"),
    [("884.F32.F32.STEP0", 16, 0), ("1688.F32", 4, 2), ("16816.F32", 2, 1), ("16816.F32.BF16", 2, 0)],
)
def test_a_product_of_wmma_is_as_many_as_its_shape_takes(shape, products, loads):
    """Two of each in the machine code's loop, one in the PTX's. Counted by hand in what ptxas 12.9 (sm_70) and nvcc
    13.0 (sm_75, sm_80) make of a product of 16 x 16 x 16."""
    more = [f"HMMA.{shape} R4, R4, R8, R4 ;"] * 2 * products + ["LDSM.16.M88.4 R4, [R9] ;"] * 2 * loads
    lines = "".join(f"        /*{n:04x}*/  {line}\n" for n, line in enumerate(more, 80))
    code = count_sass.parsed(SASS.replace("        /*0040*/", f"{lines}        /*0040*/"), 40)
    kind = "bf16" if "BF16" in shape else "f16"
    names = ["mov.b32", "ld.global", f"wmma.load.{kind}", f"wmma.mma.{kind}", "ex2.approx.f32", "bar", "bra", "ret"]
    _, inside = count_sass.parts(names, [""] * 8, count_loops.loops(8, {6: ([1], True), 7: ([], False)}), code)
    assert inside.unrolled == 2
    assert len(inside.sass) == 7 + 2 * products + 2 * loads
    # A branch around four of the six runs one time in ten: the product is what it is, the rest in proportion.
    spent = inside.spent([1, 1, 10, 10, 1, 1, 1, 1])
    assert spent == pytest.approx(10 * products + (10 + 4) * (7 + 2 * loads) / 2 / 5)


CALLED = """
        /*0000*/                   CALL.REL.NOINC `($kernel$helper) ;
        /*0010*/                   EXIT ;
$kernel$helper:
	//## File "/x/a.py", line 9
        /*0020*/                   FADD R4, R4, R8 ;
        /*0030*/                   RET.REL.NODEC R20 `(kernel) ;
$__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath:
        /*0040*/                   MUFU.RCP R5, R5 ;
        /*0050*/                   RET.REL.NODEC R20 `(kernel) ;
"""


def test_a_function_is_a_part_of_its_own():
    code = count_sass.parsed(CALLED, 40)
    assert code.functions["helper"] == (2, 4)
    outside, helper = count_sass.parts(["call", "ret", "add.f32", "back"], [""] * 4, [], code, {"helper": (2, 4)})
    # What divides slowly runs seldom.
    assert (outside.ptx, outside.sass) == ((0, 1), (0, 1))
    assert (helper.ptx, helper.sass, helper.ratio) == ((2, 3), (2, 3), 1.0)


def test_what_only_a_diverged_warp_does_is_left_out():
    text = SASS.replace("/*0060*/                   BAR", "/*0055*/  BRA.DIV UR4, `(.L_x_3) ;\n/*0060*/ BAR")
    text = text.replace("        /*0090*/", "        /*0090*/").replace(
        ".L_x_2:", ".L_x_3:\n /*0082*/ WARPSYNC.COLLECTIVE R2 ;\n /*0084*/ BRA `(.L_x_1) ;\n.L_x_2:"
    )
    code = count_sass.parsed(text, 40)
    (loop,) = count_sass.sass_loops(code)
    assert all(code.instructions[n].opcode != "WARPSYNC" for n in loop.own)
    outside, *_ = count_sass.parts(["ret"], [""], [], code)
    assert all(code.instructions[n].opcode != "WARPSYNC" for n in outside.sass)


LEFT = """
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0010*/                   FADD R4, R4, R8 ;
        /*0020*/              @P2 CALL.REL.NOINC `(.L_x_3) ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""


def test_a_loop_that_is_left_by_a_call_of_a_label():
    """ptxas 13.0 ends an inner loop so; the loop around it goes on behind the label."""
    outer, inner = count_sass.sass_loops(count_sass.parsed(LEFT, 40))
    assert (outer.body, outer.own) == (tuple(range(5)), (0, 4))
    assert inner.own == (1, 2, 3)


@pytest.mark.parametrize(
    ("names", "sass", "unrolled"),
    [
        # Ends of groups are no copies, and where a division is, a reciprocal is.
        (["cp.async", "cp.async.commit_group", "cp.async.wait_group"], ["LDGSTS.E.128 [R2], [R4.64] ;"] * 2, 2),
        (["ex2.approx.f32", "div.s32"], ["MUFU.EX2 R4, R4 ;", "MUFU.RCP R5, R5 ;"], 1),
        (["atom.add.u32"], ["ATOMG.E.ADD R4, [R2.64], R6 ;"] * 3, 3),
    ],
)
def test_what_tells_how_far_a_loop_is_unrolled(names, sass, unrolled):
    lines = "".join(f"/*{n:04x}*/ {line}\n" for n, line in enumerate(sass, 1))
    code = count_sass.parsed(f".L_x_1:\n{lines}/*0010*/ @P0 BRA `(.L_x_1) ;\n/*0020*/ EXIT ;\n", 40)
    jumps = {len(names): ([0], True), len(names) + 1: ([], False)}
    every = [*names, "bra", "ret"]
    _, inside = count_sass.parts(every, [""] * len(every), count_loops.loops(len(every), jumps), code)
    assert (inside.unrolled, len(inside.sass)) == (unrolled, len(sass) + 1)


def listing(*bodies: Sequence[str]) -> str:
    """Loops one after the other, of these instructions."""
    lines = []
    for number, body in enumerate(bodies):
        lines += [f".L_x_{number}:", *(f"/*{16:04x}*/ {one} ;" for one in body), f"/*0010*/ @P0 BRA `(.L_x_{number}) ;"]
    return "\n".join([*lines, "/*0010*/ EXIT ;", ""])


def looped(*bodies: Sequence[str]) -> tuple[list[str], list[count_loops.Loop]]:
    """The same of PTX: names and loops."""
    names, jumps = [], {}
    for body in bodies:
        jumps[len(names) + len(body)] = [len(names)], True
        names += [*body, "bra"]
    jumps[len(names)] = [], False
    return [*names, "ret"], count_loops.loops(len(names) + 1, jumps)


def test_loops_that_the_assembler_has_moved_are_told_by_what_they_do():
    """One loads more than it stores, one the other way round; the machine code, which takes each twice a turn, has
    them in the other order. In order both would be alike enough."""
    names, ours = looped(["ld.global"] * 4 + ["st.global"], ["ld.global"] + ["st.global"] * 4)
    load, store = ["LDG.E R4, [R2.64]"], ["STG.E [R2.64], R4"]
    code = count_sass.parsed(listing(load * 2 + store * 8, load * 8 + store * 2), 40)
    _, *found = count_sass.parts(names, [""] * len(names), ours, code)
    assert [(part.sass[0], part.unrolled) for part in found] == [(11, 2), (0, 2)]


def test_loops_that_are_alike_are_told_by_their_order():
    names, ours = looped(["ld.global", "add.f32"], ["ld.global", "add.f32"])
    code = count_sass.parsed(listing(*[["LDG.E R4, [R2.64]", "FADD R4, R4, R8"]] * 2), 40)
    _, *found = count_sass.parts(names, [""] * len(names), ours, code)
    assert [part.sass for part in found] == [(0, 1, 2), (3, 4, 5)]
