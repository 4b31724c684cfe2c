"""The rows of a measurement, kept as JSON and rendered as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One measured kernel and shape.

    Attributes:
        group: heading of the table it belongs to.
        name: kernel and shape.
        time_us: median time of one call.
        rate: work per second in `unit`.
        unit: "TB/s", "TFLOP/s" or "" where only the time means something.
        limit: the same lease's measured ceiling in `unit`; 0 if none applies.
        baseline: what `baseline_us` is the time of, on the same data; empty if nothing fair exists.
        baseline_us: its median time; 0 if none.
        goal: lower bound on `rate / limit` or on `rate` (TFLOP/s), or upper bound on `time_us`; None if none is set.
        goal_kind: "share", "rate" or "time".
    """

    group: str
    name: str
    time_us: float
    rate: float = 0.0
    unit: str = ""
    limit: float = 0.0
    baseline: str = ""
    baseline_us: float = 0.0
    goal: float | None = None
    goal_kind: str = "share"

    @property
    def share(self) -> float:
        """Part of the limit that was reached; 0 without a limit."""
        return self.rate / self.limit if self.limit else 0.0

    @property
    def meets_goal(self) -> bool | None:
        """Whether the goal was met; None without a goal."""
        if self.goal is None:
            return None
        if self.goal_kind == "time":
            return self.time_us <= self.goal
        return (self.share if self.goal_kind == "share" else self.rate) >= self.goal


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: `error` is the norm of the difference over the norm of the reference, or a share of mistakes."""

    name: str
    error: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run found, with the machine it found it on."""

    hardware: dict[str, str]
    checks: Sequence[Check]
    rows: Sequence[Row]
    title: str = "GPU kernels, measured"
    script: str = "measure_kernels"
    oracle: str = "float64"

    def write(self, folder: Path, stem: str) -> None:
        """Write `stem.json` and `stem.md` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / f"{stem}.md").write_text(self.markdown())

    def markdown(self) -> str:
        """Render the tables."""
        passed = sum(check.passes for check in self.checks)
        worst = max(self.checks, key=lambda check: check.error / check.tolerance if check.tolerance else check.error)
        lines = [
            f"# {self.title}",
            "",
            f"Written by `python -m loadtest.gpu.{self.script}`; do not edit. " + ", ".join(
                f"{key}: {value}" for key, value in self.hardware.items()
            ) + ".",
            "",
            f"Against {self.oracle}: {passed} of {len(self.checks)} checks pass; nearest to its tolerance is "
            f"{worst.name} ({worst.error:.1e} of {worst.tolerance:.0e}).",
        ]  # fmt: skip
        for group in dict.fromkeys(row.group for row in self.rows):
            lines += ["", f"## {group}", "", "| what | us | rate | of the limit | beside it | goal |", "|---" * 6 + "|"]
            lines += [_cells(row) for row in self.rows if row.group == group]
        return "\n".join(lines) + "\n"


def _cells(row: Row) -> str:
    rate = f"{row.rate:.3g} {row.unit}" if row.unit else ""
    share = f"{row.share:.2f}" if row.limit else ""
    beside = ""
    if row.baseline_us:
        beside = f"{row.baseline}: {row.baseline_us:.1f} us ({row.baseline_us / row.time_us:.2f}x)"
    goal = ""
    if row.goal is not None:
        wanted = {"share": f">= {row.goal}", "rate": f">= {row.goal:g} {row.unit}", "time": f"<= {row.goal:g} us"}
        goal = f"{wanted[row.goal_kind]}: {'met' if row.meets_goal else 'missed'}"
    return f"| {row.name} | {row.time_us:.1f} | {rate} | {share} | {beside} | {goal} |"
