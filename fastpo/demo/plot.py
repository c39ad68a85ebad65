"""The picture of a demo run: both loss curves, reward accuracy, time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FASTPO, TRL = "#0b6e8a", "#e0a04a"
COLOURS = {"fastpo": FASTPO, "trl": TRL}
TITLES = {"fastpo": "with fastpo", "trl": "without"}
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


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, 4, figsize=(14, 4.4), gridspec_kw={"width_ratios": [3.2, 3.2, 1.35, 1.35]}
        )
        _loss(axes[0], figures)
        _accuracy(axes[1], figures)
        comparison = figures["comparison"]
        seconds = {n: v["median_step_seconds"] or 0.0 for n, v in figures["variants"].items()}
        memory = {n: v["memory_bytes"]["increase"] / 2**20 for n, v in figures["variants"].items()}
        axes[2].set_title("Time per step")
        faster = factor(comparison["times_faster"], "faster", "slower")
        _bars(axes[2], seconds, "{:.2f} s", faster)
        axes[3].set_title("Memory of training")
        less = factor(comparison["times_less_memory"], "less", "more")
        _bars(axes[3], memory, "{:,.0f} MiB", less)
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
    """TRL's curve is broad and behind, so that both can be seen where they are one."""
    widths = {"trl": 6.0, "fastpo": 1.6}
    for name, width in widths.items():
        loss = figures["variants"][name]["loss"]
        steps = range(1, len(loss) + 1)
        marker = "o" if len(loss) == 1 else None
        axes.plot(steps, loss, color=COLOURS[name], lw=width, label=TITLES[name], marker=marker)
    difference = figures["comparison"]["largest_loss_difference"]
    words = "not finite" if difference is None else f"{difference:.1e}"
    axes.set_title("Training loss")
    _whole_steps(axes)
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title=f"largest difference {words}")


def _accuracy(axes: Any, figures: dict[str, Any]) -> None:
    fastpo, trl = figures["variants"]["fastpo"], figures["variants"]["trl"]
    ring = {"mfc": "none", "mec": TRL, "mew": 4, "ms": 13}
    without = trl["held_out"]
    label = f"held-out, {TITLES['trl']}"
    axes.plot(without["step"][1:], without["reward_accuracy"][1:], "o", label=label, **ring)
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


def _bars(axes: Any, values: dict[str, float], text: str, note: str) -> None:
    names = ("fastpo", "trl")
    heights = [values[name] for name in names]
    axes.bar([0, 1], heights, width=0.62, color=[COLOURS[name] for name in names])
    top = max(heights) or 1.0
    for x, height in enumerate(heights):
        axes.text(x, height + 0.02 * top, text.format(height), ha="center", fontsize=9)
    axes.set_xticks([0, 1], ["with", "without"])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(0, 1.18 * top)
    axes.set_xlabel(note, fontweight="bold", color=FASTPO, labelpad=6)
