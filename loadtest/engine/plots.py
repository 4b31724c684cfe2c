"""Plots of a report: throughput over concurrency of every engine, and where the time of a step goes.

    python -m loadtest.engine.plots loadtest/results/zen3.json

Draws SVGs beside the JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files
        "svg.hashsalt": "tandem",  # equal data gives equal files
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
from matplotlib import pyplot  # noqa: E402

from loadtest.engine import report as reports  # noqa: E402
from loadtest.engine.report import Report  # noqa: E402
from loadtest.engine.tables import PARTS, groups  # noqa: E402

COLORS = ("#0b7285", "#e8590c", "#868e96", "#5f3dc4")


def draw_all(report: Report, path: Path) -> None:
    """Every plot that the report, which is at `path`, has numbers for."""
    for name, part in groups(report).items():
        if len([task for task in part.get("seconds", ()) if task.startswith("decode")]) > 1:
            throughput(report, name, path.with_name(f"{path.stem}-{name.replace(', ', '-')}.svg"))
    if "breakdown" in report:
        breakdown(report["breakdown"], path.with_name(f"{path.stem}-breakdown.svg"))


def throughput(report: Report, group: str, path: Path) -> None:
    """Tokens per second over the sequences that decode at once, a line per engine."""
    seconds = report[group]["seconds"]
    batches = sorted(int(task.split()[1]) for task in seconds if task.startswith("decode"))
    names = sorted({name for batch in batches for name in seconds[f"decode {batch}"]}, key=_tandem_first)
    figure, axes = pyplot.subplots(figsize=(5.2, 3.2))
    for name, color in zip(names, COLORS, strict=False):
        known = [batch for batch in batches if name in seconds[f"decode {batch}"]]
        rates = [batch / seconds[f"decode {batch}"][name] for batch in known]
        axes.plot(known, rates, marker="o", markersize=3.5, color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences that decode at once")
    axes.set_ylabel("tokens per second")
    axes.set_title(group, loc="left")
    axes.legend(frameon=False)
    _save(figure, path)


def breakdown(report: Report, path: Path) -> None:
    """Shares of a step, a bar per number of sequences."""
    seconds = report["seconds"]
    figure, axes = pyplot.subplots(figsize=(5.2, 0.9 + 0.45 * len(seconds)))
    shades = pyplot.get_cmap("viridis")
    for row, parts in enumerate(seconds.values()):
        total, left = sum(parts[part] for part in PARTS), 0.0
        for index, part in enumerate(PARTS):
            share = parts[part] / total
            color = shades(0.1 + 0.85 * index / (len(PARTS) - 1))
            axes.barh(row, share, left=left, color=color, label=part if row == 0 else None)
            left += share
        axes.text(1.01, row, f"{1e3 * parts['step']:.2f} ms", va="center")
    axes.set_yticks(range(len(seconds)), [f"{count} sequences" for count in seconds])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title(f"{report['model']}, {report['threads']} threads: a decode step", loc="left")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    _save(figure, path)


def _tandem_first(name: str) -> tuple[bool, str]:
    return (not name.startswith("tandem"), name)


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    print(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
    """Draws all plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    path = parser.parse_args().json
    draw_all(reports.read(path), path)


if __name__ == "__main__":
    main()
