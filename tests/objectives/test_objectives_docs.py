"""The table as text: nothing missing, nothing stale."""

import re
from pathlib import Path

import notation
import objective_pages
import pytest
from quantity_meanings import MEANINGS, sides
from torch import Tensor

from fastpo import objectives
from fastpo.objectives import _describe, _registry, describe
from fastpo.objectives._quantities import SHAPES
from fastpo.objectives._registry import lookup, quantities_of

DOCS = Path(__file__).parents[2] / "docs"
KEYS = objectives.available()
PAGES = objective_pages.pages()
HEADING = re.compile(r"^#{2,3} (\w+)$", re.M)


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_are_the_table(name):
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == PAGES[name], "run: python docs/_ext/objective_pages.py"


def test_every_quantity_has_a_meaning():
    names = [name for row in MEANINGS for name in sides(row)]
    assert sorted(names) == sorted(SHAPES)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "examples/objectives.ipynb"])
def test_what_is_said_of_their_number(name):
    text = (DOCS.parent / name).read_text(encoding="utf-8")
    assert re.findall(r"(\d+) objectives", text) == [str(objective_pages.count())]
    transforms = str(len(objectives.available("transforms")))
    assert {*re.findall(r"(\d+) transforms", text)} <= {transforms}


def test_no_page_is_left_over():
    there = {f"objectives/{path.name}" for path in (DOCS / "objectives").glob("*.md")}
    assert there == PAGES.keys() - {"objectives.md"}


def test_links_of_the_pages():
    """From the table of all to the entries of a family, and from its own table."""
    found = []
    for family, keys in objectives.families().items():
        page = PAGES[f"objectives/{family}.md"]
        assert re.findall(r"\]\(#(\w+)\)", page) == list(keys)
        assert [key for key in HEADING.findall(page) if key != "Entries"] == list(keys)
        found += [(family, key) for key in keys]
    links = re.findall(r"\]\(objectives/(\w+)\.md#(\w+)\)", PAGES["objectives.md"])
    assert links == found
    assert {key for _, key in links} == set(KEYS)
    table = [line for line in PAGES["objectives.md"].splitlines() if line.startswith("| [")]
    assert all(line.count("|") == 3 for line in table)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("-log σ(β·Δ) of the batch.", r"$-\log \, \sigma (\beta \cdot \Delta)$ of the batch."),
        ("a word and a = b_i² ± ĉ", r"a word and $a = b_{i}^{2} \pm \hat{c}$"),
        ("|w|₁ ≥ 1e-6, x ∈ s: y", r"$\vert w \vert _{1} \ge 10^{-6}$, $x \in s$: $y$"),
        ("Σ_{k<K} e^{s_k} / sft_weight", r"$\sum _{k<K} \, e^{s_{k}} / \texttt{sft\_weight}$"),
        ("log Σ_{j ranked k} x", r"$\log \, \sum _{j ~\text{ranked}~ k} \, x$"),
        ("L(z - beta; t), at beta.", r"$L(z - \texttt{beta}; t)$, at `beta`."),
        ("1 where none, else 0.", "1 where none, else 0."),
    ],
)
def test_notation(text, shown):
    assert notation.rendered(text, {"sft_weight", "beta"}) == shown


@pytest.mark.parametrize("key", KEYS)
def test_a_formula_is_whole(key):
    """Spans of mathematics are closed, and so are their braces; no other sign is left."""
    shown = objective_pages.formula(lookup(key))
    spans = re.findall(r"\$(.*?)\$", shown)
    assert shown.count("$") == 2 * len(spans)
    assert all(span.count("{") == span.count("}") for span in spans)
    assert all(span.isascii() for span in spans)
    assert all(word.isascii() or word in "‖" for word in re.sub(r"\$.*?\$", "", shown).split())


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
    with pytest.raises(
        ValueError, match=r"^objective: expected one of .*, got 'dppo'; close to it: .*dpo"
    ):
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
    assert "mine" not in HEADING.findall("".join(objective_pages.pages().values()))
