"""One PTX instruction to what the executor runs: a name of its table, outputs, inputs, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .operands import NOTHING, Operands, Slot
from .text import CALL, Kernel, Statement, UnknownPtxError, bits, split

_GUARD = re.compile(r"@(!?)(%?[\w@]+)\s+(.*)", re.S)


@dataclass
class Decoded:
    name: str
    out: list[Slot] = field(default_factory=list)
    inputs: list[Slot] = field(default_factory=list)
    imm: list[int] = field(default_factory=list)
    target: int = 0
    line: int = 0
    guard: Slot = NOTHING
    negated: bool = False


# By the first word of an instruction: (its words, its operands' text, the kernel's operands) -> Decoded.
Decoder = Callable[[list[str], list[str], Operands], Decoded]
DECODERS: dict[str, Decoder] = {}


def decoder(*roots: str) -> Callable[[Decoder], Decoder]:
    def keep(function: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(roots, function))
        return function

    return keep


def decode(kernel: Kernel, statement: Statement, operands: Operands) -> Decoded:
    """Raises UnknownPtxError, with the line, for anything that is not known to the last word."""
    text, guard, negated = statement.text, NOTHING, False
    found = _GUARD.match(text)
    if found:
        guard, negated, text = operands.read(found.group(2), 4), bool(found.group(1)), found.group(3)
    op, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    words, args = op.strip().split("."), split(rest.strip())
    try:
        if words[0] == "bra":
            decoded = Decoded("bra", target=kernel.labels[args[0]])
        elif found := CALL.match(text):
            function = kernel.functions[found["name"]]
            decoded = Decoded("call", [operands.read(function.way_back)], target=function.first)
        elif words[0] in ("ld", "st") and "param" in words:
            decoded = _parameter(kernel, words, args, operands)
        else:
            decoded = DECODERS.get(words[0], _elementwise)(words, args, operands)
    except (UnknownPtxError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise UnknownPtxError(f"{kernel.name}, PTX line {statement.line}: {statement.text!r}: {error!r}") from error
    decoded.line, decoded.guard, decoded.negated = statement.line, guard, negated
    return decoded


def _parameter(kernel: Kernel, words: list[str], args: list[str], o: Operands) -> Decoded:
    place, value = args if words[0] == "st" else args[::-1]
    name, _, plus = place.strip("[]").partition("+")
    if name in kernel.passed:
        return _passed(*kernel.passed[name], int(plus or 0), words, split(value.strip("{}")), o)
    if words[0] == "st":
        raise UnknownPtxError("a kernel's parameter is written")
    if o.holds(name):
        imm = [int(plus or 0), bits(words[-1]) // 8, words[-1][0] == "s"]
        return Decoded("ld.param.at", [o.read(args[0])], [o.read(name, 8)], imm)
    at, _ = kernel.parameters[name.strip()]
    return Decoded("ld.param", [o.read(args[0])], [], [at + int(plus or 0), bits(words[-1]) // 8, words[-1][0] == "s"])


def _passed(name: str, size: int, at: int, words: list[str], values: list[str], o: Operands) -> Decoded:
    """What a call takes or gives: every byte is a register of its own."""
    width, count = bits(words[-1]) // 8, next((int(word[1:]) for word in words if word in ("v2", "v4")), 1)
    if len(values) != count or at < 0 or at + width * count > size:
        raise UnknownPtxError(f"bytes {at} to {at + width * count} of {size}")
    held = [o.read(f"{name}#{byte}") for byte in range(at, at + width * count)]
    slots = [o.read(value, 0 if o.holds(value) else max(2, width)) for value in values]
    if any(slot.bytes < width for slot in slots):
        raise UnknownPtxError("a register too narrow")
    if words[0] == "st":
        return Decoded("st.passed", held, slots, [width])
    return Decoded("ld.passed", slots, held, [width, words[-1][0] == "s"])


def _elementwise(words: list[str], args: list[str], o: Operands) -> Decoded:
    """Everything whose inputs are of the type that it names last."""
    if words[0] in ("add", "sub", "mul", "mad", "neg") and words[-1][0] in "us" and not {"hi", "wide"} & set(words):
        words = [*words[:-1], "s" + words[-1][1:]]
    size = bits(words[-1]) // 8
    return Decoded(".".join(words), [o.read(args[0])], [o.read(a, size) for a in args[1:]])


@decoder("ret", "exit")
def _leave(words: list[str], args: list[str], o: Operands) -> Decoded:
    return Decoded("back", inputs=[o.read(args[0], 4)]) if args else Decoded("ret")


@decoder("membar", "fence", "griddepcontrol")
def _fence(words: list[str], args: list[str], o: Operands) -> Decoded:
    return Decoded("nop")


@decoder("bar", "barrier")
def _barrier(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] == "warp":
        return Decoded("bar.warp")
    if words[1:4] == ["red", "or", "pred"] and len(args) == 3 and args[1] == "0":
        return Decoded("bar", [o.read(args[0], 4)], [o.read(args[2], 4)])
    if "sync" not in words or args != ["0"]:
        raise UnknownPtxError(f"a barrier of its own: {args}")
    return Decoded("bar")


@decoder("mul", "mad")
def _multiply(words: list[str], args: list[str], o: Operands) -> Decoded:
    if "wide" not in words:
        return _elementwise(words, args, o)
    size = bits(words[-1]) // 8
    added = [o.read(args[3], 2 * size)] if words[0] == "mad" else []
    return Decoded(".".join(words), [o.read(args[0])], [o.read(args[1], size), o.read(args[2], size), *added])


@decoder("shl", "shr", "bfe")
def _shift(words: list[str], args: list[str], o: Operands) -> Decoded:
    first, *rest = args[1:]
    inputs = [o.read(first, bits(words[1]) // 8), *(o.read(a, 4) for a in rest)]
    return Decoded(".".join(words), [o.read(args[0])], inputs)


@decoder("lop3", "shf", "prmt", "bfi")
def _of_words(words: list[str], args: list[str], o: Operands) -> Decoded:
    return Decoded(".".join(words), [o.read(args[0])], [o.read(a, 4) for a in args[1:]])


@decoder("mov")
def _move(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] == "pred":
        return Decoded("mov.pred", [o.read(args[0], 4)], [o.predicate(args[1])])
    width = bits(words[1])
    if args[1] in o.kernel.parameters:
        return Decoded("param", [o.read(args[0], 8)], imm=[o.kernel.parameters[args[1]][0]])
    if args[1].startswith("{"):
        count = len(split(args[1].strip("{}")))
        return Decoded(f"pack{count}.{width}", [o.read(args[0])], o.group(args[1], width // 8 // count))
    if args[0].startswith("{"):
        parts = o.group(args[0])
        return Decoded(f"unpack{len(parts)}.{width}", parts, [o.read(args[1], width // 8)])
    return Decoded(f"mov.{width}", [o.read(args[0])], [o.read(args[1], width // 8)])


@decoder("selp")
def _select(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] == "pred":
        return Decoded("selp.pred", [o.read(args[0], 4)], [o.predicate(a) for a in args[1:]])
    size = bits(words[1]) // 8
    inputs = [o.read(args[1], size), o.read(args[2], size), o.read(args[3], 4)]
    return Decoded(f"selp.{8 * size}", [o.read(args[0])], inputs)


@decoder("setp")
def _compare(words: list[str], args: list[str], o: Operands) -> Decoded:
    if len(words) != 3 + ("ftz" in words):
        raise UnknownPtxError("a comparison joined with a predicate")
    true, _, false = args[0].partition("|")
    size = bits(words[-1]) // 8
    out = [o.read(true, 4), o.read(false, 4) if false else NOTHING]
    return Decoded(".".join(words), out, [o.read(a, size) for a in args[1:]])


@decoder("and", "or", "xor", "not")
def _logic(words: list[str], args: list[str], o: Operands) -> Decoded:
    if words[1] != "pred":
        return _elementwise(words, args, o)
    return Decoded(".".join(words), [o.read(args[0], 4)], [o.predicate(a) for a in args[1:]])


@decoder("cvt")
def _convert(words: list[str], args: list[str], o: Operands) -> Decoded:
    to, origin = words[-2], words[-1]
    have, out = o.holds(args[1]), o.read(args[0])
    whole = len(words) == 3 and to[0] in "us" and origin[0] in "us"
    # The low half of a wider register.
    for wide, narrow in ((64, 32), (32, 16)):
        if have == wide // 8 and origin[1:] == str(narrow) and to[1:] == str(wide) and whole:
            return Decoded(f"cvt.{origin[0]}{wide}.{origin[0]}{narrow}.wide", [out], [o.read(args[1], wide // 8)])
    if not whole:
        return Decoded(".".join(words), [out], [o.read(a, bits(origin) // 8) for a in args[1:]])
    if origin[1:] == "8":
        # A byte lies in a register as wide as the result.
        sign = to[0] if origin[0] == "s" else "u"
        return Decoded(f"cvt.{sign}{to[1:]}.{origin}", [out], [o.read(args[1], bits(to) // 8)])
    source = o.read(args[1], bits(origin) // 8)
    if to[1:] == "8":
        return Decoded("and.b16", [out], [source, o.constant(255, 2)])
    if bits(to) > bits(origin):
        return Decoded(f"cvt.{origin[0]}{to[1:]}.{origin}", [out], [source])
    if bits(to) == bits(origin):
        return Decoded(f"mov.{bits(to)}", [out], [source])
    return Decoded(f"cvt.u{to[1:]}.u{origin[1:]}", [out], [source])


@decoder("shfl")
def _shuffle(words: list[str], args: list[str], o: Operands) -> Decoded:
    mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[words[2]]
    value, _, within = args[0].partition("|")
    out = [o.read(value, 4), o.read(within, 4) if within else NOTHING]
    return Decoded("shfl", out, [o.read(a, 4) for a in args[1:]], [mode])


@decoder("redux", "vote")
def _together(words: list[str], args: list[str], o: Operands) -> Decoded:
    name = f"redux.{words[2]}.{words[3]}" if words[0] == "redux" else f"vote.{words[2]}"
    return Decoded(name, [o.read(args[0], 4)], [o.read(a, 4) for a in args[1:]])
