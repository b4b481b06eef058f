"""Instructions that read and write memory, and matrix instructions."""

from __future__ import annotations

import re

from .decode import Decoded, decoder
from .operands import NOTHING, Operands
from .text import UnknownPtxError, bits, split

_ATOMICS = ("add", "exch", "max", "min", "and", "or", "xor", "cas")
_VECTORS = {"v2", "v4", "v8"}
_SCOPES = ("global", "gpu", "cta", "sys", "relaxed", "acquire", "release", "acq_rel")


@decoder("createpolicy")
def _policy(words: list[str], args: list[str], o: Operands) -> Decoded:
    """How long a cache keeps what is read: no value depends on it."""
    return Decoded("mov.64", [o.read(args[0], 8)], [o.constant(0, 8)])


def _space(words: list[str]) -> str:
    if "global" in words:
        return "global"
    if any(word.split("::")[0] == "shared" for word in words) and "shared::cluster" not in words:
        return "shared"
    raise UnknownPtxError("memory that is neither global nor the block's shared memory")


@decoder("ld", "st")
def _access(words: list[str], args: list[str], o: Operands) -> Decoded:
    kind, root = words[-1], words[0]
    space = "generic" if root == "ld" and set(words[1:-1]) <= _VECTORS else _space(words)
    size = bits(kind) // 8
    count = next((int(word[1:]) for word in words if word in _VECTORS), 1)
    value, place = (args[0], args[1]) if root == "ld" else (args[1], args[0])
    address, offset = o.address(place)
    wide = max(2, size)
    values = [o.read(v, 0 if o.holds(v) else wide) for v in split(value.strip().strip("{}"))]
    if len(values) != count or len(args) != 2 + any("cache_hint" in word for word in words):
        raise UnknownPtxError("operands")
    if any(0 < v.bytes < size for v in values):
        raise UnknownPtxError("a register too narrow")
    imm = [offset, size, count, int(kind[0] == "s")]
    if root == "ld":
        return Decoded(f"ld.{space}", values, [address], imm)
    return Decoded(f"st.{space}", [], [address, *values], imm)


@decoder("cp")
def _copy(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] != "async" or "bulk" in words or "mbarrier" in words:
        raise UnknownPtxError("a copy that is no cp.async")
    if "commit_group" in words:
        return Decoded("cp.async.commit_group")
    if "wait_group" in words:
        return Decoded("cp.async.wait_group", imm=[int(args[0])])
    if "wait_all" in words:
        return Decoded("cp.async.wait_all")
    if words[2] not in ("ca", "cg") or _space(words[3:4]) != "shared":
        raise UnknownPtxError("a cp.async of another kind")
    hinted = any("cache_hint" in word for word in words)
    (to, to_offset), (source, source_offset) = o.address(args[0]), o.address(args[1])
    given = [o.read(args[3], 4)] if len(args) - hinted > 3 else []
    return Decoded("cp.async", [], [to, source, *given], [to_offset, source_offset, int(args[2], 0)])


@decoder("atom", "red")
def _atomic(words: list[str], args: list[str], o: Operands) -> Decoded:
    kind = words[-1]
    op = next(word for word in words if word in _ATOMICS)
    if set(words[1:-1]) - {op, *_SCOPES} or "global" not in words:
        raise UnknownPtxError("an atomic of another kind")
    old, place, *values = args if words[0] == "atom" else ["_", *args]
    address, offset = o.address(place)
    out = o.read(old) if old != "_" else NOTHING
    return Decoded(f"atom.{op}.{kind}", [out], [address, *(o.read(v, bits(kind) // 8) for v in values)], [offset])


@decoder("ldmatrix", "stmatrix")
def _tiles(words: list[str], args: list[str], o: Operands) -> Decoded:
    if "m8n8" not in words or words[-1] != "b16" or _space(words) != "shared":
        raise UnknownPtxError("tiles of another kind")
    load = words[0] == "ldmatrix"
    address, offset = o.address(args[1] if load else args[0])
    values = o.group(args[0] if load else args[1], 4)
    imm = [offset, len(values), int("trans" in words)]
    return Decoded(words[0], values if load else [], [address, *([] if load else values)], imm)


@decoder("movmatrix")
def _turn(words: list[str], args: list[str], o: Operands) -> Decoded:
    if not {"m8n8", "trans", "b16"} <= set(words):
        raise UnknownPtxError("a tile of another kind")
    return Decoded("movmatrix", [o.read(args[0], 4)], [o.read(args[1], 4)])


@decoder("mma")
def _mma(words: list[str], args: list[str], o: Operands) -> Decoded:
    shape = next(word for word in words if re.match(r"m\d+n\d+k\d+", word))
    d, a, b, c = words[words.index("col") + 1 :]
    known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")}
    if (shape, a) not in known or a != b or (d, c) != ("f32", "f32"):
        raise UnknownPtxError("a product of another kind")
    out, *inputs = (o.group(group, 4) for group in args)
    return Decoded(f"mma.{a}", out, [slot for group in inputs for slot in group])


@decoder("wgmma")
def _wgmma(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] == "fence":
        return Decoded("nop")
    if words[1] == "commit_group":
        return Decoded("wgmma.commit")
    if words[1] == "wait_group":
        return Decoded("wgmma.wait", imm=[int(args[0])])
    shape = next(found for word in words if (found := re.match(r"m64n(\d+)k(\d+)$", word)))
    columns, depth = int(shape.group(1)), int(shape.group(2))
    number = {"f16": 0, "bf16": 1, "tf32": 2}[words[-1]]
    if "f32" not in words or words[-1] != words[-2] or depth != (8 if number == 2 else 16):
        raise UnknownPtxError("a product of another kind")
    in_registers = args[1].startswith("{")
    inputs = [*o.group(args[1], 4 if in_registers else 8), o.read(args[2], 8)]
    constant = -1
    if o.holds(args[3]):
        inputs.append(o.read(args[3], 4))
    else:
        constant = int(args[3] not in ("0", "false"))
    sign_a, sign_b, *turned = (int(a) for a in args[4:])
    a, b = (0, 0) if number == 2 else (0, turned[0]) if in_registers else (turned[0], turned[1])
    # Seven numbers fit: both signs are one.
    imm = [columns, number, int(in_registers), constant, a, b, sign_a * sign_b]
    return Decoded("wgmma", o.group(args[0], 4), inputs, imm)


@decoder("wmma")
def _wmma(words: list[str], args: list[str], o: Operands) -> Decoded:
    """Every tile lies in shared memory, whether the address says so or not."""
    if "m16n16k16" not in words or "global" in words:
        raise UnknownPtxError("a tile of another kind")
    if words[1] == "mma":
        kinds = words[words.index("m16n16k16") + 1 :]
        if kinds not in (["f32", "f32"], ["f32", "bf16", "bf16", "f32"]):
            raise UnknownPtxError("a product of another kind")
        out, *inputs = (o.group(group, 4) for group in args)
        kind = "bf16" if "bf16" in kinds else "f16"
        return Decoded(f"wmma.mma.{kind}", out, [slot for group in inputs for slot in group])
    store, columns = words[1] == "store", int(words[5] == "col")
    address, offset = o.address(args[0] if store else args[1])
    values = o.group(args[1] if store else args[0], 4)
    stride = o.read(args[2], 4)
    name = f"wmma.{words[1]}.{words[-1]}"
    if store:
        return Decoded(name, [], [address, *values, stride], [offset, columns])
    return Decoded(name, values, [address, stride], [offset, columns])
