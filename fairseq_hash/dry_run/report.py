"""What a dry run says, in tables for the terminal."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.collectives import Collective
from fairseq_hash.dry_run.hardware import Hardware
from fairseq_hash.dry_run.update import DryRun

ASSUMED = (
    "Bytes and memory are those of the operations themselves: tensors without data go through the real trainer, model, "
    "dispatcher and optimizer. Memory is what tensors take: the allocator's gaps, libraries and the process come on "
    "top.\n"
    "{rows}\n"
    "Time is an estimate. An operation takes its matrix products or its bytes of memory, whichever take longer; "
    "collectives wait for each other and for the rest; no rank waits for a slower one; reading data and saving are "
    "left out. An all-reduce goes around rings; the mean over the ranks is shown.\n"
    "Rates ({name}): {source}."
)
EVEN = "Rows are spread evenly over the experts; a rank with more of them holds, sends and computes more."


def show(
    of: DryRun,
    title: str,
    on: Hardware,
    ranks: int,
    updates: int,
    console: "Console | None" = None,
    rows: str = EVEN,
) -> None:
    """Print memory, collectives, time and what was assumed; `rows` says how rows go to experts."""
    console = console or Console()
    console.print(title, highlight=False)
    for table in (_memory(of, on), _collectives(of, on), _time(of, on, ranks, updates)):
        console.print(table)
    console.print(ASSUMED.format(rows=rows, name=on.name, source=on.source), highlight=False)


def in_nodes(on: Hardware, ranks: int, nodes: "int | None") -> Hardware:
    """Return the hardware with the ranks in so many nodes; None: in nodes that are as full as they can be.

    Raises:
        UserError: if the ranks cannot be shared out evenly.
    """
    if nodes is None:
        return on
    if nodes < 1 or ranks % nodes:
        fitting = [str(n) for n in range(1, min(ranks, 4096) + 1) if ranks % n == 0]
        raise UserError(f"--nodes {nodes} cannot share {ranks} ranks evenly; use one of {', '.join(fitting)}")
    return replace(on, devices_per_node=ranks // nodes)


def seconds_of(of: DryRun, on: Hardware) -> dict[str, float]:
    """Return the seconds of an update by what takes them, the longest first."""
    parts = {
        "matrix products": of.seconds["products"],
        "bytes of memory": of.seconds["memory"],
        "calls of operations": of.seconds["calls"],
        "bytes between ranks": of.wire_seconds(on),
    }
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def _memory(of: DryRun, on: Hardware) -> Table:
    table = Table("a rank holds", "between updates", "at the peak")
    for kind in of.peak:
        table.add_row(kind, _bytes(of.rest[kind]), _bytes(of.peak[kind]))
    peak = sum(of.peak.values())
    table.add_section()
    table.add_row("all", _bytes(sum(of.rest.values())), _bytes(peak))
    fits = "fits into" if peak <= on.memory else "does not fit into"
    table.caption = f"{of.parameters:,} parameters; {fits} {_bytes(on.memory)}"
    return _right(table)


def _collectives(of: DryRun, on: Hardware) -> Table:
    table = Table("a rank sends", "calls", "ranks", "inside its node", "to other nodes")
    kinds = dict.fromkeys((call.kind, len(call.ranks)) for call in of.calls)
    for kind, ranks in kinds:
        calls = [call for call in of.calls if (call.kind, len(call.ranks)) == (kind, ranks)]
        table.add_row(kind, f"{len(calls):,}", f"{ranks:,}", *_sent(calls, on))
    table.add_section()
    table.add_row("all", f"{len(of.calls):,}", "", *_sent(of.calls, on))
    table.caption = of.place.describe() if of.place.is_shared else ""
    return _right(table)


def _sent(calls: list[Collective], on: Hardware) -> list[str]:
    sent = [call.over_wire(on.devices_per_node) for call in calls]
    return [_bytes(sum(one[part] for one in sent)) for part in (0, 1)]


def _time(of: DryRun, on: Hardware, ranks: int, updates: int) -> Table:
    parts = seconds_of(of, on)
    total = sum(parts.values())
    table = Table("an update takes", "", "")
    for name, seconds in parts.items():
        table.add_row(name, _seconds(seconds), f"{seconds / total:.0%}")
    table.add_section()
    table.add_row("all", _seconds(total), "")
    table.add_row("work of a rank", f"{of.flops / 1e12:,.3g} TFLOPs", f"{of.flops / 1e12 / total:,.3g} TFLOPs/s")
    table.add_row("tokens/s of all ranks", f"{of.tokens * ranks / total:,.0f}", "")
    table.add_row("device hours", f"{total * updates * ranks / 3600:,.0f}", f"{updates:,} updates")
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _bytes(size: float) -> str:
    return _scaled(size, 1e9, "GB", 1e6, "MB") if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _scaled(value: float, large: float, name: str, small: float, small_name: str) -> str:
    return f"{value / large:,.2f} {name}" if value >= large else f"{value / small:,.1f} {small_name}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
