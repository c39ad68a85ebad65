"""`fastpo info`: what a report of a fault needs. Nothing is patched, and nothing is downloaded."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .bench.machine import cpu_name, installed
from .ops.products import own_dtypes
from .ops.rows import cpu, registry
from .ops.rows.native import compiled

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "liger_kernel",
    "flash_attn",
)


def facts() -> dict[str, Any]:
    """All of it, as JSON has it: None for what is not there, and a reason beside it."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {name: installed(name) for name in ("fastpo", *PACKAGES)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        "devices": {str(device): _device(device) for device in devices},
        "extension": _extension(),
        "backends": {str(device): _backends(device) for device in devices},
        "patch": _patch(),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        products = "fastpo's" if own_dtypes() else "PyTorch's"
        return {"name": cpu_name(), "threads": torch.get_num_threads(), "products": products}
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "capability": capability, "mib": found.total_memory // 2**20}


def _extension() -> dict[str, Any]:
    """The compiled rows, and the instructions their CPU half has chosen."""
    module, missing = compiled()
    if module is None:
        return {"file": None, "reason": missing, "cpu": None, "cuda": False, "cutlass": False}
    return {
        "file": module.__file__,
        "reason": None,
        "cpu": cpu.ISAS[cpu.ISA],
        "cuda": module.has_cuda,
        "cutlass": module.has_cutlass,
    }


def _backends(device: torch.device) -> dict[str, Any]:
    reasons = {name: registry.unavailable(name, device) for name in registry.BACKENDS}
    return {"chosen": registry.choose(None, device), "unavailable": reasons}


def _patch() -> dict[str, Any]:
    """What `fastpo.patch()` would stand in for. Its modules are imported, as trainers do."""
    found: dict[str, Any] = {"how": None, "reason": None, "names": {}, "unfit": {}}
    if installed("trl") is None:
        return {**found, "reason": "trl is not installed"}
    try:
        from .integrations.seams.seam import fitting
        from .integrations.trl.patch import DEFAULTS

        seams = fitting({seam: make for seam, make in DEFAULTS.items() if seam.package == "trl"})
    except (ImportError, RuntimeError) as error:
        return {**found, "how": "lazy logits", "reason": str(error)}
    names, unfit = defaultdict(list), {}
    for seam in seams:
        try:
            if seam.read() is not None:
                names[seam.module].append(seam.name)
        except RuntimeError as error:
            unfit[seam.module] = str(error)
    return {**found, "how": "seams", "names": dict(names), "unfit": unfit}


def text(found: dict[str, Any]) -> str:
    """The same for people, a part under each heading."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    versions = found["versions"]
    yield f"fastpo {versions['fastpo']}, Python {found['python']}, {found['platform']}"
    yield "\nVersions"
    yield from (f"  {name:<14}{versions[name] or 'not installed'}" for name in PACKAGES)
    yield "\nDevices"
    for device, facts in found["devices"].items():
        words = [f"{value} {key}" for key, value in facts.items() if key != "name"]
        yield f"  {device:<14}{', '.join([facts['name'], *words])}"
    if len(found["devices"]) == 1:
        yield f"  {'cuda':<14}none; torch is built for {found['torch_cuda'] or 'no CUDA'}"
    yield "\nExtension"
    yield from (f"  {line}" for line in _extension_lines(found["extension"]))
    for device, backends in found["backends"].items():
        yield f"\nBackends on {device}"
        for name, reason in backends["unavailable"].items():
            served = "the default" if name == backends["chosen"] else "there"
            yield f"  {name:<14}{served if reason is None else 'no: ' + reason}"
    yield f"\nfastpo.patch() with TRL {versions['trl'] or '-'}"
    yield from (f"  {line}" for line in _patch_lines(found["patch"]))


def _extension_lines(extension: dict[str, Any]) -> Iterator[str]:
    if extension["file"] is None:
        yield extension["reason"]
        yield "Without it CPUs run plain PyTorch, and GPUs Triton's kernels."
        return
    parts = {name: "with" if extension[name] else "without" for name in ("cuda", "cutlass")}
    yield extension["file"]
    yield (f"{extension['cpu']} rows on the CPU, {parts['cuda']} CUDA, {parts['cutlass']} CUTLASS")


def _patch_lines(patch: dict[str, Any]) -> Iterator[str]:
    if patch["how"] != "seams":
        yield patch["reason"] if patch["how"] is None else f"lazy logits: {patch['reason']}"
    for module, names in patch["names"].items():
        yield f"{module}: {', '.join(names)}"
    for module, reason in patch["unfit"].items():
        yield f"{module}: not taken over: {reason}"
