"""The picture of a demo run: loss curves, reward accuracy, time and memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

FASTPO, SHARED, TRL = "#0b6e8a", "#3fa7c4", "#e0a04a"
COLOURS = {"fastpo": FASTPO, "shared": SHARED, "trl": TRL}
TITLES = {"fastpo": "with fastpo", "shared": "+ shared prompts", "trl": "without"}
INK = "#2b2b2b"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8a8a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#ececec",
    "legend.frameon": False,
}


def available() -> bool:
    """matplotlib is not among what the trainings need."""
    return find_spec("matplotlib") is not None


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, 4, figsize=(15, 4.4), gridspec_kw={"width_ratios": [3.2, 3.2, 1.7, 1.7]}
        )
        _loss(axes[0], figures)
        _accuracy(axes[1], figures)
        comparison = figures["comparison"]
        seconds = {n: v["median_step_seconds"] for n, v in figures["variants"].items()}
        memory = {n: v["memory_bytes"]["increase"] / 2**20 for n, v in figures["variants"].items()}
        axes[2].set_title("Time per step")
        bars(axes[2], seconds, "{:.2f} s", best(comparison, "times_faster", "faster", "slower"))
        axes[3].set_title("Memory of training")
        less = best(comparison, "times_less_memory", "less", "more")
        bars(axes[3], memory, "{:,.0f} MiB", less)
        figure.suptitle(_headline(figures), x=0.012, ha="left", fontsize=10, color="#5c5c5c")
        figure.tight_layout(rect=(0, 0, 1, 0.97), w_pad=2.5)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _headline(figures: dict[str, Any]) -> str:
    machine, data = figures["machine"], figures["data"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{figures['objective']['key']} on {data['train_pairs']} pairs ({data['source']}), "
        f"{figures['model']['parameters'] / 1e6:.1f} M parameters   |   "
        f"TRL {figures['versions']['trl']}, torch {figures['versions']['torch']}   |   {where}"
    )


def _loss(axes: Any, figures: dict[str, Any]) -> None:
    """TRL's curve is broad and behind, so that all can be seen where they are one."""
    widths = {"trl": 7.0, "fastpo": 3.0, "shared": 1.0}
    for name, width in widths.items():
        loss = figures["variants"][name]["loss"]
        steps = range(1, len(loss) + 1)
        marker = "o" if len(loss) == 1 else None
        axes.plot(steps, loss, color=COLOURS[name], lw=width, label=TITLES[name], marker=marker)
    words = difference(figures["comparison"])
    axes.set_title("Training loss")
    _whole_steps(axes)
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title=words)


def _accuracy(axes: Any, figures: dict[str, Any]) -> None:
    fastpo = figures["variants"]["fastpo"]
    for name, size in {"trl": 17, "shared": 11}.items():
        ring = {"mfc": "none", "mec": COLOURS[name], "mew": 3, "ms": size}
        end, label = figures["variants"][name]["held_out"], f"held-out, {TITLES[name]}"
        axes.plot(end["step"][1:], end["reward_accuracy"][1:], "o", label=label, **ring)
    if "reward_accuracy" in fastpo:
        batches = fastpo["reward_accuracy"]
        steps, label = range(2, len(batches) + 1), "training batch"
        axes.plot(steps, batches[1:], color=FASTPO, lw=1, alpha=0.3, label=label)
    held_out, label = fastpo["held_out"], f"held-out, {TITLES['fastpo']}"
    style = {"color": FASTPO, "lw": 1.6, "marker": "o", "ms": 5, "label": label}
    axes.plot(held_out["step"], held_out["reward_accuracy"], **style)
    axes.axhline(0.5, color="#8a8a8a", lw=1, ls=":")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Reward accuracy")
    _whole_steps(axes)
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right")


def _whole_steps(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def factor(ratio: float | None, better: str, worse: str) -> str:
    """ "3.1x faster", or "1.2x slower"."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


def best(comparison: dict[str, Any], of: str, better: str, worse: str) -> str:
    """With fastpo, and with shared prompts: "3.1x, 3.8x faster"."""
    words = [factor(comparison[name][of], better, worse) for name in ("fastpo", "shared")]
    number, _, kind = words[0].partition(" ")
    return ", ".join([number if words[1].endswith(kind) else words[0], *filter(None, words[1:])])


def difference(comparison: dict[str, Any]) -> str:
    found = [comparison[name]["largest_loss_difference"] for name in ("fastpo", "shared")]
    return f"largest difference {'not finite' if None in found else f'{max(found):.1e}'}"


def bars(axes: Any, values: dict[str, float | None], text: str, note: str) -> None:
    """None where there is no value: a single step is the first, which is not counted."""
    heights = [values[name] or 0.0 for name in COLOURS]
    axes.bar(range(3), heights, width=0.62, color=list(COLOURS.values()))
    top = max(heights) or 1.0
    for x, (name, height) in enumerate(zip(COLOURS, heights, strict=True)):
        label = "–" if values[name] is None else text.format(height)
        axes.text(x, height + 0.02 * top, label, ha="center", fontsize=9)
    axes.set_xticks(range(3), ["with", "+ shared\nprompts", "without"], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(0, 1.18 * top)
    axes.set_xlabel(note, fontweight="bold", color=FASTPO, labelpad=6)
