"""PTX text as instructions in basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
BYTES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}
PREFIX_BITS = {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}  # of registers declared as %name<count>
ENDS_BLOCK = ("bra", "ret", "exit", "trap")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?"
)


class UnsupportedError(Exception):
    """PTX that the emulator does not know."""


@dataclass
class Instruction:
    """One instruction, its operands as text.

    Args:
        op: opcode with its suffixes, such as "ld.global.b32".
        args: operands. Vectors keep their braces and addresses their brackets.
        predicate: register of the guard, or None.
        negated: True for a guard that must be false.
        where: source file and line.
    """

    op: str
    args: list[str]
    predicate: str | None
    negated: bool
    where: str

    @property
    def parts(self) -> list[str]:
        """Opcode and suffixes."""
        return self.op.split(".")

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.op} {', '.join(self.args)} ({self.where})"


@dataclass
class Kernel:
    """An entry of a PTX module.

    Args:
        name: name of the entry.
        parameters: name and size in bytes of each parameter.
        threads: threads of a program.
        registers: index and bits (1 for predicates) of each register.
        blocks: basic blocks in the order of the text.
        labels: number of the block behind each label.
    """

    name: str
    parameters: list[tuple[str, int]]
    threads: int
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)

    def register(self, name: str) -> tuple[int, int]:
        """Return index and bits of a register. Those of a counted declaration are known by their prefix."""
        if name not in self.registers:
            match = re.match(r"%([a-z]+)", name)
            if match is None or match[1] not in PREFIX_BITS:
                raise UnsupportedError(f"register {name}")
            self.registers[name] = (len(self.registers), PREFIX_BITS[match[1]])
        return self.registers[name]


def parse(ptx: str, name: str) -> Kernel:
    """Parse one entry of a module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx))
    head, body = ptx[ptx.index(f".visible .entry {name}(") :].split("\n{", 1)
    sizes = [(m[2], int(m[3]) if m[3] else BYTES[m[1]]) for m in PARAMETER.finditer(head)]
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    assert threads is not None, "the entry does not say its number of threads"
    kernel = Kernel(name, sizes, int(threads[1]))
    _Body(kernel, files).read(body)
    return kernel


class _Body:
    """The text of an entry: statements, and the scopes of inline assembly with their own names."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = []
        self.count = 0  # of scopes so far
        self.where = "?"

    def read(self, text: str) -> None:
        for raw in text.split("\n"):
            line = raw.split("//")[0].strip()
            if line.startswith(".section"):
                return
            if line.startswith(".loc"):
                _, file, number, *_ = line.split()
                self.where = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{number}"
            elif not line.startswith((".pragma", ".file", ".b8", ".b32", ".b64")):
                for statement in _statements(line):
                    self._statement(statement)

    def _statement(self, text: str) -> None:
        if text == "{":
            self.count += 1
            self.scopes.append({})
            return
        if text == "}":
            if self.scopes:
                self.scopes.pop()
            return
        label = re.match(r"^([$A-Za-z_][\w$]*):\s*(.*)$", text)
        if label:
            self._new_block()
            self.kernel.labels[self._declare(label[1])] = len(self.kernel.blocks) - 1
            text = label[2]
        if text.startswith(".reg"):
            self._registers(text)
        elif text and not text.startswith("."):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        bits = 1 if kind == ".pred" else 8 * BYTES[kind[1:]]
        for name in names.split(","):
            counted = re.match(r"(%?\w+)<(\d+)>", name.strip())
            if counted is None:
                self.kernel.registers[self._declare(name.strip())] = (len(self.kernel.registers), bits)
            elif self.scopes:
                for i in range(int(counted[2])):
                    self.kernel.registers[self._declare(f"{counted[1]}{i}")] = (len(self.kernel.registers), bits)

    def _instruction(self, text: str) -> None:
        guard = re.match(r"^@(!?)([%\w]+)\s+(.*)$", text)
        predicate, negated = (self._renamed(guard[2]), bool(guard[1])) if guard else (None, False)
        match = re.match(r"^([\w.:]+)\s*(.*)$", guard[3] if guard else text)
        assert match is not None, text
        args = [re.sub(r"[%A-Za-z_$][\w$]*", lambda m: self._renamed(m[0]), a) for a in split(match[2])]
        instruction = Instruction(match[1], args, predicate, negated, self.where)
        self.kernel.blocks[-1].append(instruction)
        if instruction.parts[0] in ENDS_BLOCK or match[1].startswith(("bar.sync", "barrier.sync", "mbarrier.try_wait")):
            self._new_block()

    def _new_block(self) -> None:
        if self.kernel.blocks[-1]:
            self.kernel.blocks.append([])

    def _declare(self, name: str) -> str:
        if self.scopes:
            self.scopes[-1][name] = f"{name}#{self.count}"
        return self._renamed(name)

    def _renamed(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)


def split(text: str) -> list[str]:
    """Split operands at the commas outside of braces and brackets."""
    out, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            out.append("")
        else:
            out[-1] += character
    return [part.strip() for part in out if part.strip()]


def vector(operand: str) -> list[str]:
    """Return the elements of a vector operand, or the operand itself."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def _statements(line: str) -> list[str]:
    """Split a line at semicolons. A brace that opens or closes a scope is a statement."""
    out, current, depth = [], "", 0
    for character in line:
        opens = character == "{" and not current.strip()
        if opens or (character == "}" and depth == 0) or character == ";":
            out += [current.strip(), "" if character == ";" else character]
            current = ""
        else:
            depth += (character == "{") - (character == "}")
            current += character
    return [statement for statement in (*out, current.strip()) if statement]
