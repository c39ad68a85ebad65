"""Machine code as Triton's wheel reads it: resources, loops, what follows a block's products."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def disassembled(cubin: bytes, code: bool = True) -> str:
    """Resources and machine code, as Triton's wheel reads them; resources alone take no time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        wanted = ["--dump-resource-usage", *(["--dump-sass"] if code else [])]
        command = [str(CUOBJDUMP), *wanted, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(text: str) -> dict[str, int]:
    """Registers, stack, local memory and matrix instructions."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    units = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG")
    counts = {name: len(re.findall(rf"\b{name}[. ]", text)) for name in units}
    counts["epilogue"] = len(epilogue(text))
    return {name.lower(): int(value) for name, value in (found | counts).items()}


def instructions(sass: str) -> list[tuple[int, str]]:
    """Each with its address."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)
    return [(int(place, 16), text.strip()) for place, text in found]


_BRANCH = re.compile(r"(@!?U?P\d+ )?BRA(?:\.\w+)? 0x([0-9a-f]+)")


def loops(sass: str) -> list[list[str]]:
    """The bodies of loops that end, in the order of the code."""
    code, found = instructions(sass), []
    for place, text in code:
        branch = _BRANCH.match(text)
        if branch and int(branch[2], 16) < place:
            found.append([text for at, text in code if int(branch[2], 16) <= at <= place])
    return found


def epilogue(sass: str) -> list[str]:
    """What a thread runs from the last product's end to the next block, where no mask is needed.

    Masks are apart: a branch leads around each group of them. Of Hopper's kernel alone.
    """
    return path_behind_products(sass, lambda x: "FSEL" in x and "MUFU" not in x)


def path_behind_products(sass: str, apart: Callable[[str], bool]) -> list[str]:
    """From the last product's end to a branch back; `apart`: which instructions are led around."""
    code = instructions(sass)
    place_of = {place: i for i, (place, _) in enumerate(code)}
    waits = [i for i, (_, text) in enumerate(code) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in text]
    path, i = [], waits[0] if waits else len(code)
    while i < len(code):
        place, text = code[i]
        path.append(text)
        branch = _BRANCH.match(text)
        to = int(branch[2], 16) if branch else place + 1
        if to <= place or "EXIT" in text:
            break
        i += 1
        if branch and to in place_of:
            skipped = " ".join(text for _, text in code[i : place_of[to]])
            i = place_of[to] if not branch[1] or apart(skipped) else i
    return path


def reduction_layouts(ttgir: str) -> list[str]:
    """How each sum and maximum of a row is spread over threads, which fixes its order.

    Whole programs and blocks of rows: the result is a number, or a number per row.
    """
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = re.findall(r"\}\) : \(tensor<(\w+), (#[^>]*>?)>\) -> (?:f32|tensor)", ttgir)
    return [f"{shape} {named.get(layout, layout)}" for shape, layout in found]
