"""The tables of train.py."""

from collections.abc import Sequence
from typing import Any

from rounds import Spread


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return both tables as lines."""
    heading = ["experts", "candidate", "ms an update", "updates/s", "tokens/s", "/ dense", "hash / BASE"]
    heading += ["TFLOP/s (of the rate)", "rate", "peak MB", "held MB", "planned MB", "parameters", "active"]
    lines = ["", table_line(heading), "|---|---|" + "---:|" * (len(heading) - 2)]
    for one in (one for one in rows if "updates_per_second" in one):
        faster = "{over_base:.2f} ({over_base_low:.2f} to {over_base_high:.2f})" if "over_base" in one else ""
        cells = [
            f"{one['updates_per_second']:.3g}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['ratio']:.2f}",
            faster.format(**one),
            f"{one['model_flops_per_second'] / 1e12:.3g} ({one['utilisation']:.0%})",
            f"{one['rate_flops_per_second'] / 1e12:.3g}",
        ]
        sizes = [one[key] for key in ("peak_bytes", "held_bytes", "state_bytes_planned")]
        cells += ["" if size is None else f"{size / 1e6:,.0f}" for size in sizes]
        cells += [f"{one['parameters']:,}", f"{one['active']:,}"]
        lines.append(table_line((str(one["experts"]), one["candidate"], text(one, 1000, ".1f"), *cells)))
    decoded = [one for one in rows if "updates_per_second" not in one]
    if decoded:
        lines += ["", "| experts | sentences | candidate | ms a step | / dense |", "|---|---|---|---:|---:|"]
    for one in decoded:
        cells = (str(one["experts"]), str(one["tokens"]), one["candidate"], text(one, 1000, ".2f"))
        lines.append(table_line((*cells, f"{one['ratio']:.2f}")))
    return lines


def table_line(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text(one: dict[str, Any], factor: float, digits: str) -> str:
    """Return median and quartiles of the result of `Spread.as_seconds`, in other units."""
    return Spread(one["seconds"], one["low"], one["high"]).text(factor, digits)
