"""PTX as text into kernels: parameters, registers and basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "bf16": 16, **{f"{kind}{bits}": bits for bits in (8, 16, 32, 64) for kind in "bsuf"}}

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?:\s+\.ptr(?:\s+\.\w+(?:\s+\d+)?)*)?\s+(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?"
)
# What may begin at the place where a statement is expected. A brace there opens or closes a scope of register names.
_PIECE = re.compile(
    r"\s*(?:(?P<label>[$\w]+):|(?P<brace>[{}])|(?P<debug>\.(?:loc|file)\b[^\n]*)|(?P<statement>[^;]+);)", re.DOTALL
)
_STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>[%$\w]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_NAME = re.compile(r"(?<![\w$.%])%?[A-Za-z_$][\w$]*")


class PtxError(Exception):
    """The text is not the PTX that this machine knows, or does what a GPU would not allow."""


@dataclass
class Parameter:
    name: str
    size: int
    align: int


@dataclass
class Instruction:
    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    """`blocks`: a branch can end one and a label can begin one, nowhere else; `labels`: the block that each begins."""

    name: str
    threads: int | None
    parameters: list[Parameter]
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # width in bits, by name without its number
    shared: dict[str, int] = field(default_factory=dict)  # bytes, by name

    def width(self, register: str) -> int | None:
        """Bits of a register; None: there is no such register."""
        return self.registers.get(register, self.registers.get(register.rstrip("0123456789")))


def kernels_of(text: str) -> dict[str, str]:
    """The text of each kernel of a module, by name; `parse` reads one. (A module of all kernels is 5 MB.)"""
    starts = [m.start() for m in _ENTRY.finditer(text)] + [len(text)]
    parts = [text[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    return {_ENTRY.match(part)[1]: part for part in parts}


def parse(text: str) -> Kernel:
    """Parses the first kernel of a PTX text."""
    head = _ENTRY.search(text)
    threads = re.search(r"\.(?:max|req)ntid\s+(\d+)", head[3])
    parameters = []
    for m in _PARAMETER.finditer(head[2]):
        size = WIDTHS[m["type"]] // 8
        parameters.append(Parameter(m["name"], size * int(m["count"] or 1), int(m["align"] or size)))
    kernel = Kernel(head[1], int(threads[1]) if threads else None, parameters)
    _read_body(kernel, re.sub(r"//[^\n]*|/\*.*?\*/", "", text[head.end() :], flags=re.DOTALL))
    return kernel


def _read_body(kernel: Kernel, text: str) -> None:
    at, scopes = 0, [{}]
    while scopes:
        piece = _PIECE.match(text, at)
        if piece is None:
            raise PtxError(f"{kernel.name}: expected a statement, got {text[at : at + 60]!r}")
        at = piece.end()
        if piece["label"]:
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[piece["label"]] = len(kernel.blocks) - 1
        elif piece["brace"] == "{":
            scopes.append({})
        elif piece["brace"]:
            scopes.pop()
        elif piece["statement"]:
            _read_statement(kernel, piece["statement"].strip(), scopes)


def _read_statement(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> None:
    if text.startswith(".reg"):
        return _declare(kernel, text, scopes)
    if text.startswith(".shared"):
        m = re.fullmatch(r"\.shared\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
        kernel.shared[m[2]] = WIDTHS[m[1]] // 8 * int(m[3] or 1)
        return
    if text.startswith(".pragma"):
        return
    for scope in scopes[:0:-1]:  # names of inner scopes hide those of outer ones
        text = _NAME.sub(lambda m, scope=scope: scope.get(m[0], m[0]), text)
    m = _STATEMENT.fullmatch(text)
    operands = [o.strip() for o in _OPERAND.findall(m["operands"])]
    kernel.blocks[-1].append(Instruction(m["opcode"], operands, m["guard"], bool(m["negated"])))
    if m["opcode"].split(".")[0] in ("bra", "ret", "exit"):
        kernel.blocks.append([])


def _declare(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> None:
    """`.reg .b32 %r<10>` declares %r0 to %r9; `.reg .f16 a, b` two, in inner scopes under names that are unique."""
    _, kind, names = text.split(maxsplit=2)
    for name in names.split(","):
        name = name.strip().partition("<")[0]
        if len(scopes) > 1:
            unique = f"{name}${kind[1:]}"
            scopes[-1][name] = unique
            name = unique
        kernel.registers[name] = WIDTHS[kind[1:]]
