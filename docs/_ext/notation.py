"""The formulas of docstrings as Markdown: words stay words, what stands between them is LaTeX.

>>> rendered("-log σ(β·Δ) of the batch.", set())
'$-\\log \\sigma(\\beta \\cdot \\Delta)$ of the batch.'
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "·": r" \cdot ",
    "±": r" \pm ",
    "≥": r" \ge ",
    "≤": r" \le ",
    "∈": r" \in ",
    "‖": r" \Vert ",
    "||": r" \Vert ",
    "|": r" \vert ",
    "½": r"\tfrac{1}{2}",
    ":=": ":=",
}
_RAISED = {"²": "^{2}", "³": "^{3}", "⁺": "^{+}", "₊": "_{+}", "₋": "_{-}", "₁": "_{1}"}
_FUNCTIONS = {"log", "exp", "max", "min", "ln"}
_OPERATORS = {"softmax", "clamp", "sg", "KL", "NLL", "mean", "odds", "sorted", "k3"}
_SYMBOLS = {"logp", "old", "ref", "lv", "pi"}  # what reads like a word and is none
_LONE = {"mean", "sorted", "odds"}  # words, unless something stands behind them
_WORD = re.compile(r"[A-Za-z]{2,}(?:[-'][A-Za-z]+)*(?:/[a-z]+)?'?")
_LETTER = r"[^\W\d_²³⁺₊₋₁½]\u0302?"
_TOKEN = re.compile(
    r"(?P<text>\{[^{}]*\})|(?P<power>\d+e-\d+)|(?P<sign>:=|\|\||[·±≥≤∈‖½|])"
    rf"|(?P<raised>[²³⁺₊₋₁])|(?P<hot>one-hot)"
    rf"|(?P<name>{_LETTER}(?:{_LETTER}|\d)*)(?P<low>(?:_[^\W_²³⁺₊₋₁]+)*)"
    r"|(?P<star>\*(?= |$))|(?P<space>(?<=[\w)\]}]) (?=\w))|(?P<other>.)",
    re.DOTALL,
)


def rendered(text: str, names: set[str]) -> str:
    """Markdown; `names` are set in the typeface of code wherever they stand."""
    chunks = _chunks(" ".join(text.split()))
    parts: list[str] = []
    span = ""
    for chunk, prose in zip(chunks, _prose(chunks, names), strict=True):
        if prose:
            parts += [_span(span, names)] * bool(span) + [_code(chunk, names)]
            span = ""
            continue
        span = f"{span} {chunk}".lstrip()
        # A line may break where a clause ends.
        if chunk[-1] in ".:" or (chunk[-1] in ",;" and _depth(span) <= 0):
            parts.append(_span(span, names))
            span = ""
    return " ".join([*parts, _span(span, names)]).strip()


def _chunks(text: str) -> list[str]:
    """Between spaces, but for those within braces and backticks."""
    return re.findall(r"(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|`[^`]*`|\S)+", text)


def _prose(chunks: list[str], names: set[str]) -> list[bool]:
    """Of each chunk, whether it is a word; names beside mathematics are part of it."""
    found = [_is_word(chunk) for chunk in chunks]
    for i, chunk in enumerate(chunks):
        follows = i + 1 < len(chunks) and found[i + 1]
        if chunk == "a" or re.fullmatch(r"\(\d+", chunk):  # an article, a number before a word
            found[i] = follows
    for i, chunk in enumerate(chunks):
        if found[i] and chunk.strip(".,:;()") in names:
            before = i > 0 and not found[i - 1] and chunks[i - 1][-1] in "-+=·/><≥±,"
            before |= chunk.count(")") > chunk.count("(")
            after = i + 1 < len(chunks) and chunks[i + 1] in ("-", "+", "=", "/", "≥")
            found[i] = not (before or after)
    return found


def _depth(text: str) -> int:
    return sum(text.count(c) for c in "([") - sum(text.count(c) for c in ")]")


def _is_word(chunk: str) -> bool:
    bare = chunk.strip('.,:;()"')
    if chunk.startswith("`") or bare.startswith("TRL"):
        return True
    if bare in _SYMBOLS or (bare in _FUNCTIONS | _OPERATORS and bare not in _LONE):
        return False
    return _WORD.fullmatch(bare) is not None


def _code(chunk: str, names: set[str]) -> str:
    bare = chunk.strip('.,:;()"')
    return chunk.replace(bare, f"`{bare}`") if bare in names else chunk


def _span(text: str, names: set[str]) -> str:
    body = text.rstrip(".,:;")
    if re.fullmatch(r"[\d\[\],. ]*", body):
        return text
    if body in names:
        return f"`{body}`{text[len(body) :]}"
    return f"${latex(body, names)}${text[len(body) :]}"


def latex(text: str, names: set[str]) -> str:
    """Of mathematics as docstrings write it."""
    text = unicodedata.normalize("NFD", text)
    text = re.sub(rf"\^({_LETTER}(?:[^\W_])*|\d+|\(.*?\))", r"^{\1}", text)
    shown = "".join(_latex(found, names) for found in _TOKEN.finditer(text))
    return re.sub(" +", " ", shown).replace(" }", "}").replace(" )", ")").strip()


def _latex(found: re.Match[str], names: set[str]) -> str:
    kind = found.lastgroup if found.lastgroup != "low" else "name"
    whole = found[0]
    if kind == "text":
        return "{" + _within(whole[1:-1], names) + "}"
    if kind == "power":
        factor, power = whole.split("e")
        return ("" if factor == "1" else rf"{factor} \cdot ") + f"10^{{{power}}}"
    if kind == "name":
        return _name(found["name"], found["low"], names)
    fixed = {"star": "^{*}", "space": r" \, ", "hot": r"\text{one-hot}"}
    return fixed.get(kind or "") or _SIGNS.get(whole) or _RAISED.get(whole) or whole


def _within(text: str, names: set[str]) -> str:
    """What stands in braces: words are set upright."""
    words = text.split()
    upright = [_is_word(word) for word in words]
    if len(words) == 1 or not any(upright):
        return latex(text, names)
    parts = zip(words, upright, strict=True)
    return " ".join(rf"~\text{{{w}}}~" if up else latex(w, names) for w, up in parts)


def _name(name: str, low: str, names: set[str]) -> str:
    whole = name + low
    stem, _, last = whole.rpartition("_")
    candidates = (whole, stem) if len(last) < 3 else (whole,)
    known = next((n for n in candidates if len(n) > 1 and n in names), None)
    if known:
        below = whole[len(known) + 1 :]
        return rf"\texttt{{{known}}}".replace("_", r"\_") + (f"_{{{below}}}" if below else "")
    if len(name) > 1 and len(low) > 3:  # a name of some other code
        return rf"\texttt{{{whole}}}".replace("_", r"\_")
    return _base(name) + (f"_{{{_below(low[1:])}}}" if low else "")


def _base(name: str) -> str:
    if name in _FUNCTIONS:
        return rf"\{name} "
    if name in _OPERATORS:
        return rf"\operatorname{{{name}}}"
    if name == "pi":
        return r"\pi "
    if re.fullmatch(r"[a-z]\d", name):
        return f"{name[0]}_{{{name[1]}}}"
    if len(name) > 1 and name.isascii():
        return rf"\mathrm{{{name}}}"
    return "".join(map(_letter, re.findall(rf"{_LETTER}|\d", name)))


def _letter(letter: str) -> str:
    bare = letter[0]
    shown = bare if bare.isascii() else rf"\{_greek(bare)} "
    return rf"\hat{{{shown.strip()}}}" if len(letter) > 1 else shown


def _greek(letter: str) -> str:
    """The command, by the letter's name: lambda is LAMDA there."""
    name = unicodedata.name(letter).rpartition(" ")[2].lower().replace("lamda", "lambda")
    return {"Σ": "sum"}.get(letter) or (name.capitalize() if letter.isupper() else name)


def _below(low: str) -> str:
    if len(low) <= 2 and low.isascii():
        return low
    return rf"\mathrm{{{low}}}" if low.isascii() else "".join(map(_letter, low))
