"""A report's tables, in Markdown."""

from __future__ import annotations

from loadtest.engine.report import Report

PARTS = ("native", "schedule", "prepare", "update", "message")
"""Of a step, native code first."""


def groups(report: Report) -> Report:
    """What was measured of a model with a kind of weights; by names such as `135m, int8`."""
    return {name: part for name, part in report.items() if ", " in name}


def markdown(report: Report) -> str:
    """Every table that the report has numbers for."""
    sections = [f"{report.get('machine', '')}. Medians of interleaved rounds; in brackets, times as long as Tandem.\n"]
    for name, part in groups(report).items():
        if "seconds" in part or "workload_seconds" in part:
            sections.append(f"## {name}\n")
        if "read_roof_gb_per_s" in part:
            sections.append(f"Reads of all threads: {part['read_roof_gb_per_s']:.1f} GB/s.\n")
        if "seconds" in part:
            sections.append(_steps(part))
        if "workload_seconds" in part:
            sections.append(_workload(part))
        if "tokens_per_s" in part:
            sections += [f"## {name}\n", _suite(part)]
    if "breakdown" in report:
        sections += ["## A decode step's parts\n", _breakdown(report["breakdown"])]
    if "took_s" in report:
        sections.append(f"Measured in {sum(report['took_s'].values())} s: {report['took_s']}\n")
    return "\n".join(sections)


def share_of_roof(part: Report) -> float | None:
    """How near bfloat16 decoding at batch 1 comes to reading each weight once at the roof."""
    seconds = part.get("seconds", {}).get("decode 1", {}).get("tandem:bfloat16")
    if seconds is None or "read_roof_gb_per_s" not in part:
        return None
    return float(part["bfloat16_weight_bytes"] / part["read_roof_gb_per_s"] / 1e9 / seconds)


def _steps(part: Report) -> str:
    seconds = part["seconds"]
    names = list(next(iter(seconds.values())))
    rows = [
        [task, *(f"{1e3 * row[name]:.1f} ({row[name] / row[names[0]]:.2f})" for name in names)]
        for task, row in seconds.items()
    ]
    table = _table(["ms", *names], rows)
    share = share_of_roof(part)
    table += f"\nDecoding after {part['context']} tokens of each sequence.\n"
    return table + (f"Decode 1 at {share:.2f} of the roof.\n" if share else "")


def _workload(part: Report) -> str:
    seconds = part["workload_seconds"]
    first = next(iter(seconds.values()))
    rows = [[name, f"{value:.1f}", f"{value / first:.2f}"] for name, value in seconds.items()]
    return _table([f"{part['workload_requests']} requests", "s", "x Tandem"], rows)


def _suite(part: Report) -> str:
    rates = part["tokens_per_s"]
    rows = [[name, f"{rate:.0f}", f"{rate / rates['engine alone']:.2f}"] for name, rate in rates.items()]
    return _table([f"{part['streams']} streams, {part['requests']} requests", "tokens/s", "of the engine"], rows)


def _breakdown(part: Report) -> str:
    rows = []
    for count, times in part["seconds"].items():
        cells = [f"{1e6 * times[name]:.0f}" for name in (*PARTS, "step")]
        outside = f"{1e6 * times['outside']:.0f} ({times['outside'] / times['step']:.1%})"
        rows.append([f"{count} sequences", *cells, outside])
    title = f"{part['model']}, {part['threads']} threads, us"
    return _table([title, *PARTS, "step", "outside native code"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
