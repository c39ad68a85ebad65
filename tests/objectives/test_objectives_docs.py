"""The table as text: nothing missing, nothing stale."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from fastpo import objectives
from fastpo.objectives import _describe, _registry, describe
from fastpo.objectives._registry import lookup, quantities_of

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
KEYS = objectives.available()


def test_the_page_is_the_table():
    written = PAGE.read_text(encoding="utf-8")
    assert written == _describe.page(), "run: python -m fastpo.objectives > docs/objectives.md"


def test_the_command_writes_the_page():
    command = [sys.executable, "-X", "utf8", "-W", "error", "-m", "fastpo.objectives"]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert run.stdout == _describe.page()
    assert run.stderr == ""


def test_links_of_the_page():
    page = _describe.page()
    links = re.findall(r"\]\(#(\w+)\)", page)
    assert links == re.findall(r"^### (\w+)$", page, re.M)
    assert set(links) == set(KEYS)
    table = [line for line in page.splitlines() if line.startswith("| [")]
    assert all(line.count("|") == 5 for line in table)
    assert len(table) == len(KEYS)


def test_the_table_has_everything():
    text = describe()
    words = set(re.split(r"[\s(),]+", text))
    for key in KEYS:
        entry = lookup(key)
        quantities = {n + "?" * (not needed) for n, needed in quantities_of(entry.function).items()}
        assert {key, *entry.aliases} <= words
        assert quantities <= words
    assert max(map(len, text.splitlines())) <= sum(_describe._WIDTHS) + 6
    assert not re.search(r" $", text, re.M)


@pytest.mark.parametrize("key", KEYS)
def test_an_entry_in_full(key):
    entry, text = lookup(key), describe(key)
    assert text.splitlines()[0].startswith(f"{key} ({entry.family})")
    assert entry.paper in text
    formula = entry.function.__doc__.splitlines()[0]
    assert text.count(formula) == 1
    for name, needed in quantities_of(entry.function).items():
        assert re.search(
            rf"^  [∂ ] {name} +\[.+\]{'' if needed else ', may be absent'}$", text, re.M
        )
    for name, parameter in entry.parameters.items():
        assert re.search(rf"^  {name}=.+  {re.escape(parameter.expected)}$", text, re.M)
    for alias in entry.aliases:
        assert describe(alias) == text
    assert max(map(len, text.splitlines())) <= 100


def test_one_entry_to_the_letter():
    assert describe("gpm") == (
        "gpm (rewards)\n"
        "arXiv:2410.02197\n"
        "\n"
        "gpm(chosen_rewards, rejected_rewards, eigenvalues=None, *, tau=0.1, margin=0.0)\n"
        "\n"
        "-log σ((s - margin)/τ), s = Σ_i e_i·(w_{2i}·l_{2i+1} - w_{2i+1}·l_{2i}).\n"
        "\n"
        "e = eigenvalues or 1. s is antisymmetric, so preferences may run in circles.\n"
        "\n"
        "quantities\n"
        "  ∂ chosen_rewards    [B, D]\n"
        "  ∂ rejected_rewards  [B, D]\n"
        "  ∂ eigenvalues       [B, E], may be absent\n"
        "\n"
        "hyperparameters\n"
        "  tau=0.1     a number in (0, inf)\n"
        "  margin=0.0  a number in (-inf, inf)"
    )


def test_a_transform_says_where_it_goes():
    text = describe("f_divergence")
    assert "gives\n  chosen_logratios\n  rejected_logratios" in text
    assert "only before: discopop, dpo," in text
    assert "refuses pair_weights" in describe("aot")


def test_families():
    table = describe(family="rewards")
    assert "maxmin_rm" in table and "diffusion_dpo" not in table
    with pytest.raises(ValueError, match=r"^family: expected one of transforms, .*, got 'pear'$"):
        describe(family="pear")
    with pytest.raises(ValueError, match=r"^objective: expected one of .*, got 'dppo'$"):
        describe("dppo")


def test_rows_of_ones_own(monkeypatch):
    """Described like the others, and absent from the page of the library."""
    for table in ("_TABLE", "_ALIASES"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))

    @objectives.objective("mine", family="pairs", shapes={"chosen_rewards": "B"})
    def mine(chosen_rewards: Tensor, *, scale: float = 2.0) -> Tensor:
        """scale·r."""
        return scale * chosen_rewards

    assert "∂ chosen_rewards  [B]\n" in describe("mine")
    assert "mine" in describe(family="pairs")
    assert "mine" not in re.findall(r"^### (\w+)$", _describe.page(), re.M)
