"""Translates the PTX of a kernel to C++, which runs it on a CPU with a thread for each lane.

A machine without a GPU can thus run what the compiler made for a GPU. Each instruction becomes a
statement; those that no kernel has are not translated. Floating-point arithmetic is accepted only if PTX
rounds it as IEEE 754 does; then the driver's assembler may not contract it either. What differs from a
GPU are the bits of a NaN.
"""

from __future__ import annotations

import re

# C++'s types of registers, by the names that the compiler gives them, and of operands
REGISTERS = {
    "p": "bool", "rs": "uint16_t", "r": "uint32_t", "rd": "uint64_t", "f": "float", "fd": "double",
}  # fmt: skip
TYPES = {"pred": "bool", "f32": "float", "f64": "double"} | {
    f"{letter}{bits}": f"{name}{bits}_t"
    for letter, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
    for bits in (8, 16, 32, 64)
}
SPECIAL = {
    "%tid.x": "(uint32_t)LANE", "%ntid.x": "(uint32_t)LANES", "%ctaid.x": "(uint32_t)BLOCK",
    "%nctaid.x": "(uint32_t)BLOCKS",
}  # fmt: skip
ROUNDED = {"add", "sub", "mul", "div", "fma", "mad", "sqrt", "rcp", "rsqrt"}
EXPRESSIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mad": "{0} * {1} + {2}",
    "div": "{0} / {1}", "rem": "{0} % {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "mov": "{0}", "cvta": "{0}", "neg": "-{0}", "not": "~{0}", "rcp": "1 / {0}",
    "sqrt": "std::sqrt({0})", "fma": "std::fma({0}, {1}, {2})", "prmt": "permuted({0}, {1}, {2})",
    "min": "lesser({0}, {1})", "max": "greater({0}, {1})",
}  # fmt: skip
COMPARISONS = {
    "eq": "{0} == {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "ne": "{0} < {1} || {0} > {1}",
    # those that NaN fulfils
    "ltu": "!({0} >= {1})", "leu": "!({0} > {1})", "gtu": "!({0} <= {1})", "geu": "!({0} < {1})",
    "neu": "!({0} == {1})",
}  # fmt: skip
TO_WHOLE = {"rni": "std::rint", "rmi": "std::floor", "rzi": "std::trunc"}

PRELUDE = """
#include "portable.h"
#include <cstdint>
#include <limits>
template <typename To, typename From> static To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &value, sizeof to);
    return to;
}
// A register holds a value of its own size by its bits, and a smaller one extended.
template <typename T, typename Register> static void assign(Register &target, T value) {
    if constexpr (sizeof(T) == sizeof(Register)) target = bits<Register>(value);
    else target = value;
}
template <typename T> static T load(uint64_t address) {
    T value;
    std::memcpy(&value, (const void *)address, sizeof value);
    return value;
}
template <typename T> static void save(uint64_t address, T value) {
    std::memcpy((void *)address, &value, sizeof value);
}
template <typename T> static T lesser(T a, T b) { return a < b || b != b ? a : b; }
template <typename T> static T greater(T a, T b) { return a > b || b != b ? a : b; }
template <typename To, typename From> static To saturated(From value) {
    using Limits = std::numeric_limits<To>;
    if (value != value) return 0;
    if (value <= (From)Limits::min()) return Limits::min();
    return value >= (From)Limits::max() ? Limits::max() : (To)value;
}
static uint16_t half_of(float value) {
    uint16_t half;
    store(&half, value);
    return half;
}
static uint32_t permuted(uint64_t low, uint64_t high, uint32_t selector) {
    const uint64_t both = low | high << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
"""


def cpp_of_ptx(text: str) -> str:
    """Returns C++ with `<entry>_host(blocks, threads, arguments)` for each entry of a kernel's PTX.

    It is compiled with -DLANES_ARE_THREADS and without contraction.

    Raises:
        ValueError: for an instruction that is not translated, or not rounded as in IEEE 754.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)[^{]*\{(.*?)\n\}", text, flags=re.DOTALL)
    return PRELUDE + "".join(_entry(*entry) for entry in entries)


def _entry(name: str, parameters: str, body: str) -> str:
    declared = ", ".join(
        f"{TYPES[kind]} {parameter}"
        for kind, parameter in re.findall(r"\.param \.(\w+)[^,]*?(\w+)(?:,|$)", parameters.strip())
    )
    lines, size = [], 0
    for prefix, count in re.findall(r"\.reg \.\w+\s+%(\w+)<(\d+)>;", body):
        names = ", ".join(f"{prefix}{i}" for i in range(int(count)))
        lines.append(f"{REGISTERS[prefix]} {names};")
    for align, symbol, count in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", body):
        size = -(-size // int(align)) * int(align)
        lines.append(f"constexpr uint32_t {symbol} = {size};")
        size += int(count)
    lines.append(f"alignas(16) SHARED char shared[{size + 1}];")
    body = re.sub(r"\.(reg|shared|pragma) [^;]*;", "", body)
    for part in re.findall(r"\$?\w+:|[^;{}\s][^;:]*;", body):
        lines.append(_statement(part.strip()))
    body = "\n".join(lines).replace("$", "")
    return f"KERNEL({name}, 0, 0)({declared}) {{\n{body}\n}}\nHOST_LAUNCH({name})\n"


def _statement(instruction: str) -> str:
    guarded = re.fullmatch(r"@(!?)%(p\d+)\s+(.*)", instruction, flags=re.DOTALL)
    if guarded:
        return f"if ({guarded[1]}{guarded[2]}) {_statement(guarded[3])}"
    if instruction.endswith(":"):
        return f"{instruction};"
    name, *rest = instruction.rstrip(";").split(maxsplit=1)
    operation, *modifiers = name.split(".")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", " ".join(rest))
    if operation in ("ret", "bar", "bra"):
        return {"ret": "return;", "bar": "BARRIER();"}.get(operation) or f"goto {operands[0]};"
    if operation in ("ld", "st"):
        return _memory(operation, modifiers, operands)
    target, *sources = operands
    if operation == "mov" and "{" in target + sources[0]:
        return _halves(target, sources[0])
    kind, value = _result(operation, modifiers, sources)
    return f"assign<{TYPES[kind]}>({target[1:]}, {value});"


def _memory(operation: str, modifiers: list[str], operands: list[str]) -> str:
    """Translates a load or a store of one value or of a vector."""
    place, values = reversed(operands) if operation == "ld" else operands
    base, _, offset = place.strip("[]").partition("+")
    kind = modifiers[-1]
    registers = re.findall(r"[^{},\s]+", values)
    address = {
        "param": lambda: f"(uint64_t)&{base}",
        "global": lambda: _value(base, "u64"),
        "shared": lambda: (
            f"(uint64_t)shared + {_value(base, 's64' if base[:3] == '%rd' else 's32')}"
        ),
    }[modifiers[0]]()
    lines = []
    for i, register in enumerate(registers):
        at = f"{address} + {offset or 0} + {i} * sizeof({TYPES[kind]})"
        if operation == "ld":
            lines.append(f"assign<{TYPES[kind]}>({register[1:]}, load<{TYPES[kind]}>({at}));")
        else:
            lines.append(f"save<{TYPES[kind]}>({at}, {_value(register, kind)});")
    return f"{{ {' '.join(lines)} }}"


def _halves(target: str, source: str) -> str:
    """Translates a move between a register and two of half its size."""
    low, high = re.findall(r"%(\w+)", target if "{" in target else source)
    whole, half = ("uint32_t", 16) if low.startswith("rs") else ("uint64_t", 32)
    if "{" in target:
        word = _value(source, f"u{2 * half}")
        return f"{{ {low} = (uint{half}_t){word}; {high} = {word} >> {half}; }}"
    return f"assign<{whole}>({target[1:]}, ({whole}){high} << {half} | {low});"


def _result(operation: str, modifiers: list[str], sources: list[str]) -> tuple[str, str]:
    """Returns the type of an instruction's result, and the expression that computes it."""
    kind = modifiers[-1]
    name = f"{operation}.{'.'.join(modifiers)}"
    if kind[0] == "f" and operation in ROUNDED and modifiers[:-1] != ["rn"]:
        raise ValueError(f"{name} is not rounded as in IEEE 754")
    if operation == "cvt":
        return _converted(modifiers, sources[0])
    if operation == "setp":
        if kind[0] != "f" and modifiers[0] == "ne":
            modifiers = ["neu", kind]
        values = [_value(source, kind) for source in sources]
        return "pred", COMPARISONS[modifiers[0]].format(*values)
    if operation == "selp":
        first, second, chosen = _value(sources[0], kind), _value(sources[1], kind), sources[2][1:]
        return kind, f"{chosen} ? {first} : {second}"
    if operation in ("shl", "shr"):
        value, amount, most = _value(sources[0], kind), _value(sources[1], "u32"), int(kind[1:]) - 1
        if operation == "shr" and kind[0] == "s":
            return kind, f"{value} >> ({amount} > {most} ? {most} : {amount})"
        return (
            kind,
            f"{amount} > {most} ? 0 : {value} {'<<' if operation == 'shl' else '>>'} {amount}",
        )
    if operation not in EXPRESSIONS:
        raise ValueError(f"{name} is not translated")
    values = [_value(source, kind) for source in sources]
    if "wide" in modifiers:
        kind = f"{kind[0]}{2 * int(kind[1:])}"
        values = [f"({TYPES[kind]}){value}" for value in values]
    elif kind[0] == "s" and operation in ("add", "sub", "mul", "mad"):
        # In C++, only numbers without a sign wrap around.
        values = [f"(u{TYPES[kind]}){value}" for value in values]
    if kind == "pred" and operation == "not":
        return kind, f"!{values[0]}"
    return kind, EXPRESSIONS[operation].format(*values)


def _converted(modifiers: list[str], source: str) -> tuple[str, str]:
    *rounding, to, origin = modifiers
    if origin == "f16":
        return to, f"to_float({_value(source, 'u16')})"
    value = _value(source, origin)
    if to == "f16":
        return "u16", f"half_of({value})"
    if origin[0] == "f" and rounding and rounding[0] in TO_WHOLE:
        value = f"{TO_WHOLE[rounding[0]]}({value})"
    elif rounding not in ([], ["rn"]):
        raise ValueError(f"cvt.{'.'.join(modifiers)} is not translated")
    return to, f"saturated<{TYPES[to]}>({value})" if origin[0] == "f" != to[0] else value


def _value(operand: str, kind: str) -> str:
    """Returns an operand as a value of this type."""
    if operand in SPECIAL:
        return SPECIAL[operand]
    if operand.startswith(("0f", "0d")):
        return f"bits<{TYPES[kind]}>(0x{operand[2:]}{'u' if operand[1] == 'f' else 'ull'})"
    if re.fullmatch(r"-?\d+", operand):
        return f"({TYPES[kind]}){operand}ll"
    if not operand.startswith("%"):  # the place of shared memory
        return f"({TYPES[kind]}){operand}"
    name = operand[1:]
    same = (name[0] == "f") == (kind[0] == "f")
    return f"({TYPES[kind]}){name}" if same else f"bits<{TYPES[kind]}>({name})"
