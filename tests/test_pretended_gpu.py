"""The GPU that is pretended where there is none refuses what a real one refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("fastpo._C")

TESTS = Path(__file__).parent
# Each inside a guard against waiting.
FAIL = {
    "copy": "torch.zeros(3).cuda()",
    "copy_into": "torch.zeros(3, device='cuda').copy_(torch.zeros(3))",
    "numbers": "torch.tensor((1.0, 2.0), device='cuda')",
    "new_numbers": "torch.zeros(3, device='cuda').new_tensor([1.0])",
    "index": "torch.zeros(3, device='cuda')[torch.tensor([1, 2])]",
    "copy_in_an_operator": "torch.ops.fastpo.copies(torch.zeros(3, device='cuda'))",
    "two_devices": "torch.zeros(3, device='cuda') + torch.zeros(3)",
    "value_for_the_library": "check.judge(head, torch.ones(4, device='cuda'))",
}
PASS = {
    "drawing_a_head": "assert make_head(4, 9, 2, device='cuda', bias=True).bias.device.index == 0",
    "copy_without_waiting": "torch.zeros(3).to('cuda', non_blocking=True)",
    "value": "torch.zeros(3, device='cuda').tolist()",
    "primitive": "fastpo.linear_logps(head.hidden, head.weight, head.labels)",
}
OPERATOR = """
@torch.library.custom_op("fastpo::copies", mutates_args=())
def copies(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x)).to(x.device)

@copies.register_fake
def _(x):
    return torch.empty_like(x)
"""
PROBE = """
def test_{}():
    head = make_head(4, 9, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    {}
"""


def test_it_refuses_what_a_gpu_refuses(tmp_path):
    imports = "import torch, fastpo\nfrom fastpo.bench import check\n"
    imports += "from fastpo.testing import make_head\n"
    probes = [PROBE.format(*each) for each in (FAIL | PASS).items()]
    (tmp_path / "test_probes.py").write_text(imports + OPERATOR + "".join(probes))
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "_pretended_gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-rA", "--tb=line", "-q", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    outcomes = re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", done.stdout, re.MULTILINE)
    found = {name: outcome for outcome, name in outcomes}
    expected = dict.fromkeys(FAIL, "FAILED") | dict.fromkeys(PASS, "PASSED")
    assert found == expected, done.stdout[-3000:] + done.stderr[-3000:]
