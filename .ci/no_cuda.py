"""torch from its Linux wheels without NVIDIA's libraries, which a CPU never calls: gigabytes.

    pip install --no-deps torch==2.8.0
    python .ci/no_cuda.py build/versions/lowest/lib/python3.10/site-packages/torch

torch is loaded only beside them. Every function that it asks of one says "no device" here, and its
metadata ask for them no more, so that pip leaves them aside from then on; what is installed
stays. Python runs this that has pyelftools, of auditwheel, and ziglang.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

NVIDIA = re.compile(r"lib(cu|nv|nccl)")
ITS_NAMES = re.compile(r"(__cuda|cu|nv|nccl)")
ITS_PACKAGES = re.compile(r"Requires-Dist: (cuda|nvidia)-.*\n")
NO_DEVICE = 100


def wanted(library: Path, there: set[str]) -> Iterator[tuple[str, str, str]]:
    """Libraries of NVIDIA's that are not there, versions and names that `library` asks of them."""
    with library.open("rb") as stream:
        elf = ELFFile(stream)
        (dynamic,) = (part for part in elf.iter_sections() if isinstance(part, DynamicSection))
        needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
        missing = [name for name in needed if NVIDIA.match(name) and name not in there]
        yield from ((name, "", "") for name in missing)
        versions = {
            one["vna_other"]: (need.name, one.name)
            for need, ones in elf.get_section_by_name(".gnu.version_r").iter_versions()
            for one in ones
        }
        # A name without a version is looked for in every library: any may have it.
        indices = elf.get_section_by_name(".gnu.version")
        for position, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = indices.get_symbol(position)["ndx"]
            source, version = versions.get(index, (missing[0] if missing else "", ""))
            undefined = symbol["st_shndx"] == "SHN_UNDEF"
            if undefined and source in missing and ITS_NAMES.match(symbol.name):
                yield source, version, symbol.name


def write(target: Path, versions: dict[str, set[str]]) -> None:
    names = sorted(set().union(*versions.values()))
    labels = "".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name in names)
    script = "".join(
        f"{version} {{ global: {' '.join(f'{name};' for name in sorted(found))} }};\n"
        for version, found in versions.items()
        if version
    )
    with tempfile.TemporaryDirectory() as temporary:
        source, mapping = Path(temporary, "names.s"), Path(temporary, "names.map")
        source.write_text(f".text\n{labels}mov ${NO_DEVICE}, %eax\nret\n")
        mapping.write_text(script)
        command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu", "-shared"]
        command += [f"-Wl,-soname,{target.name}", "-nostdlib", source, "-o", target]
        command += [f"-Wl,--version-script={mapping}"] if script else []
        subprocess.run(command, check=True)


def main(folder: str) -> None:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    torch = Path(folder)
    libraries = torch / "lib"
    there = {path.name for path in torch.parent.glob("nvidia/**/lib/*.so*")}
    there |= {path.name for path in libraries.iterdir()}
    for library in sorted(libraries.glob("*.so")):
        for name, version, symbol in wanted(library, there):
            found[name][version].update({symbol} - {""})
    for name in found:
        write(libraries / name, found[name])
    (metadata,) = torch.parent.glob("torch-*.dist-info/METADATA")
    metadata.write_text(ITS_PACKAGES.sub("", metadata.read_text()))
    print(f"{torch}: {', '.join(sorted(found)) or 'nothing'} without a device")


if __name__ == "__main__":
    main(*sys.argv[1:])
