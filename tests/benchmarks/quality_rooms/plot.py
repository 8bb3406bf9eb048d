"""Quality against budget, a panel a group of tasks, as a PNG. Needs matplotlib (the extra `bench`)."""

from collections.abc import Sequence
from pathlib import Path

from quality_rooms.intervals import interval
from quality_rooms.judging import FULL
from quality_rooms.report import SEED, Run, measure_of
from quality_rooms.tasks import GROUPS

__all__ = ["draw", "require"]

COLORS = {"paper": "tab:red", "default": "tab:orange", "sequential 0.1": "tab:blue", "sequential 0.25": "tab:cyan"}
PLAIN = {"random": ("tab:gray", ":"), "last tokens": ("tab:brown", ":")}


def require() -> None:
    """Ends the program at once, not after the run, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'graphkv[bench]'") from None


def draw(runs: Sequence[Run], base: str, file: Path) -> None:
    """One row of panels a model; methods on `base`, with their 95% intervals as bands."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(runs), len(GROUPS), figsize=(5 * len(GROUPS), 4 * len(runs)), squeeze=False)
    for line, run in zip(axes, runs, strict=True):
        for panel, group in zip(line, GROUPS, strict=True):
            if run.tasks(group):
                _panel(panel, run, group, base)
        line[0].set_ylabel(run.about["model"])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(8, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.04 / len(runs), 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(panel: object, run: Run, group: str, base: str) -> None:
    measure, factor = measure_of(group)
    styles = {base: ("black", "-")} | {f"{base} + {name}": (color, "-") for name, color in COLORS.items()} | PLAIN
    for method, (color, style) in styles.items():
        if method not in run.methods:
            continue
        means, lows, highs = [], [], []
        for budget in run.budgets:
            found = interval([run.values(task, method, [budget], measure) for task in run.tasks(group)], seed=SEED)
            means.append(found.mean * factor)
            lows.append(found.low * factor)
            highs.append(found.high * factor)
        panel.plot(run.budgets, means, style, color=color, marker="o", markersize=3, label=method)
        panel.fill_between(run.budgets, lows, highs, color=color, alpha=0.08, linewidth=0)
    panel.axhline(run.mean(group, FULL, [0], measure) * factor, color="tab:green", linestyle="--", label="full cache")
    unit = "exact match, points" if factor == 100.0 else "nats a token (less is better)"
    panel.set(title=f"{group}: {unit}", xlabel="budget B", xscale="log", xticks=run.budgets)
    panel.set_xticklabels([str(budget) for budget in run.budgets])
    panel.minorticks_off()
