"""PTX text to kernels: statements with their operands, labels resolved, names made unique."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Bits and kind of what a register holds; `b` is no number of its own.
WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(
    r"\.param(?:\s+\.align\s+\d+)?\s+\.(\w+)(?:\s+\.ptr[.\w\s]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*[,)\n]"
)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_LABEL = re.compile(r"([A-Za-z_$][\w$]*):(?!:)")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+(.*)", re.S)
_NAME = re.compile(r"[%A-Za-z_$][\w$.]*")


class Statement(NamedTuple):
    text: str
    guard: str | None  # the predicate's name
    negated: bool
    parts: tuple[str, ...]  # of the instruction, at its points: ("ld", "global", "v4", "f32")
    operands: tuple[str, ...]


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    threads: int  # of a block, 0 where the text does not say
    parameters: list[Parameter]
    code: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # names, or prefixes of many, to types


class Module(NamedTuple):
    kernels: dict[str, Kernel]
    shared: dict[str, int]  # offsets of what is in shared memory by name
    static: int  # bytes of it of a size known here; the rest begins behind


def parse(text: str) -> Module:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", text, flags=re.M)
    shared, static = {}, 0
    for extern, align, name, size in _SHARED.findall(text):
        if not extern:
            static = -(-static // int(align)) * int(align)
            shared[name] = static
            static += int(size)
    for extern, align, name, _ in _SHARED.findall(text):
        if extern:
            static = -(-static // max(int(align), 16)) * max(int(align), 16)
            shared[name] = static
    kernels = [_kernel(text, found) for found in _ENTRY.finditer(text)]
    return Module({kernel.name: kernel for kernel in kernels}, shared, static)


def _kernel(text: str, entry: re.Match[str]) -> Kernel:
    head, body = text[entry.end() : text.index("{", entry.end())], text.index("{", entry.end())
    parameters, offset = [], 0
    for kind, name, length in _PARAM.findall(head):
        bytes_ = int(kind.lstrip("bufs")) // 8
        # What has a length is a struct, aligned to 64 bytes at most: so are all here.
        align = 64 if length else bytes_
        offset = -(-offset // align) * align
        parameters.append(Parameter(name, offset, int(length or 1) * bytes_))
        offset += parameters[-1].size
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", head)
    kernel = Kernel(entry[1], int(threads[1]) if threads else 0, parameters)
    _Body(kernel).read(text, body + 1)
    return kernel


class _Body:
    """Blocks in braces have names of their own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        # Labels may be ahead: guesses by scope, resolved at the end.
        self.targets: list[tuple[int, str, list[dict[str, str]]]] = []

    def read(self, text: str, at: int) -> None:
        space = re.compile(r"\s*")
        while True:
            at = space.match(text, at).end()  # type: ignore[union-attr]
            if text[at] == "{":
                self.opened += 1
                self.scopes.append({})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
                if not self.scopes:
                    return self.finish()
            elif label := _LABEL.match(text, at):
                self.scopes[-1][label[1]] = self.unique(label[1])
                self.kernel.labels[self.scopes[-1][label[1]]] = len(self.kernel.code)
                at = label.end()
            else:
                end = text.index(";", at)
                self.statement(" ".join(text[at:end].split()))
                at = end + 1

    def unique(self, name: str) -> str:
        return name if len(self.scopes) == 1 else f"{name}.{self.opened}"

    def statement(self, text: str) -> None:
        if declared := _REGISTERS.fullmatch(text):
            for name in re.split(r"\s*,\s*", declared[2]):
                many = re.fullmatch(r"(.*?)<\d+>", name)
                plain = many[1] if many else name
                self.scopes[-1][plain] = plain if many else self.unique(plain)
                self.kernel.registers[self.scopes[-1][plain]] = declared[1]
            return
        if text.startswith("."):
            return
        guard, negated, rest = None, False, text
        if guarded := _GUARD.fullmatch(text):
            guard, negated, rest = self.renamed(guarded[2]), bool(guarded[1]), guarded[3]
        opcode, _, given = rest.partition(" ")
        parts = tuple(re.split(r"\.(?!:)", opcode))
        operands = tuple(split(given))
        if parts[0] == "bra":
            self.targets.append((len(self.kernel.code), operands[0], list(self.scopes)))
        else:
            operands = tuple(_NAME.sub(lambda x: self.renamed(x[0]), x) for x in operands)
        self.kernel.code.append(Statement(text, guard, negated, parts, operands))

    def renamed(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def finish(self) -> None:
        code = self.kernel.code
        for i, label, scopes in self.targets:
            name = next(scope[label] for scope in reversed(scopes) if label in scope)
            code[i] = code[i]._replace(operands=(name,))


def split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()] if text.strip() else []
