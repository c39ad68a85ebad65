"""The kernels as Hugging Face's loader takes them: a tree of its own, without fastpo."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "hub.py"
TOOLS = ROOT / "build" / "hub-tools"  # `make hub` puts the loader there
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")

# What `rows` finds in two tiles of a row, and what torch makes of the whole.
USE = """
import torch
torch.manual_seed(0)
products, labels = torch.randn(5, 70), torch.randint(0, 70, (5,))
state = torch.zeros(7, 5)
state[0], state[6], state[2] = float("-inf"), float("-inf"), float("nan")
for first in (0, 64):
    tile = products[:, first:first + 64].contiguous()
    rows.rows_fwd(tile, first, labels, None, state, None, None, inverse=None, softcap=False,
                  scale=1.0, post=1.0, stats=0, headroom=0.0, fold_cap=False)
most, others, target = state[:3]
logps = (target - most) - torch.log(others + torch.exp(target - most))
expected = products.log_softmax(-1).gather(1, labels[:, None])[:, 0]
torch.testing.assert_close(logps, expected)
print("same")
"""
BY_FILE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_hub_kernels", {folder!r} + "/__init__.py")
module = sys.modules["_hub_kernels"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rows = module.rows
"""
BY_LOADER = """
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build
Build.open(Path({tree!r}))
rows = get_local_kernel(Path({tree!r}), backend="cpu").rows
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tree"
    subprocess.run([sys.executable, SCRIPT, folder], check=True)
    return folder


def run(program: str, folder: Path, **environment: str) -> None:
    settings = {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-c", program + USE]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_modules_know_nothing_but_torch_triton_and_one_another(tree: Path) -> None:
    sources = sorted((tree / "torch-ext" / "fastpo_kernels").glob("*.py"))
    assert {path.name for path in sources} >= {"__init__.py", "rows.py", "_blocks.py"}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [x.name for x in node.names] if isinstance(node, ast.Import) else []
            tops = {str(name).partition(".")[0] for name in names}
            assert tops <= {"torch", "triton"} | sys.stdlib_module_names, path


def test_every_variant_is_whole(tree: Path) -> None:
    whole = {path.name for path in (tree / "torch-ext" / "fastpo_kernels").iterdir()}
    for variant in ("torch-cpu", "torch-cuda"):
        folder = tree / "build" / variant
        assert {path.name for path in folder.iterdir()} == whole | {"metadata.json"}
        assert json.loads((folder / "metadata.json").read_text())["python-depends"] == []


def test_it_runs_from_a_path_outside_any_package(tree: Path, tmp_path: Path) -> None:
    run(BY_FILE.format(folder=str(tree / "build" / "torch-cpu")), tmp_path)


@pytest.mark.skipif(not TOOLS.is_dir(), reason="`make hub` brings the loader")
def test_the_loader_takes_it(tree: Path, tmp_path: Path) -> None:
    run(BY_LOADER.format(tree=str(tree)), tmp_path, PYTHONPATH=str(TOOLS))
