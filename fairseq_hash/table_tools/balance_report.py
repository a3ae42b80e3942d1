"""Reports on judged tables: on the terminal, and as a folder with a page, a figure, CSV and JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text  # plain strings would be read as markup

from fairseq_hash.core.files import write_folder
from fairseq_hash.hashing.balance import complaint
from fairseq_hash.provenance import provenance
from fairseq_hash.table_tools.evaluate_balance import JudgedTable

if TYPE_CHECKING:  # printing needs none of the packages that draw and write pages
    import pandas as pd

MOST_SHOWN = 10  # overloading keys on the terminal; the files have them all
ON_PAGE = 50

# Figures of `Judged.figures`, by their headings.
HEADINGS = {
    "largest_over_mean": "largest load / mean",
    "bound_over_mean": "no table is below",
    "smallest_over_mean": "smallest load / mean",
    "coefficient_of_variation": "coefficient of variation",
    "entropy_share": "entropy / log E",
}
MEANING = """
The load of an expert is the number of tokens that it serves; the mean load is tokens x experts per token / experts. If
the largest load / mean is 1, all experts do the same work. No table for these keys has a largest load below the bound:
a proof, not an estimate. A key overloads if its count alone exceeds the mean load. Then no table for these keys is
balanced, and a table with other keys is needed (builder spread).

Held-out text was not seen when the table was built, unless the same text is given twice.
"""


def show(tables: Sequence[JudgedTable], symbols: list[str]) -> None:
    """Print one table with all details, or several tables side by side."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    if len(tables) > 1:
        _show_several(console, tables)
    else:
        _show_one(console, tables[0], symbols)
    for table in tables:
        for judged in table.judged:
            if text := complaint(judged.balance):
                print(f"note: {table.name}, on {judged.source}: {text}")


def _show_one(console: Console, table: JudgedTable, symbols: list[str]) -> None:
    shown = Table(show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in describe(table).items():
        shown.add_row(name, Text(value))
    console.print(shown)
    if not table.judged:
        return
    balance = Table("", *(judged.what for judged in table.judged))
    every = [judged.figures() for judged in table.judged]
    balance.add_row("from", *(Text(figures["source"], overflow="fold") for figures in every))
    balance.add_row("tokens", *(f"{figures['tokens']:,}" for figures in every))
    for key, heading in HEADINGS.items():
        balance.add_row(heading, *(f"{figures[key]:.4f}" for figures in every))
    balance.add_row("keys that overload", *(f"{figures['overloading_keys']:,}" for figures in every))
    balance.add_row("their share of all tokens", *(f"{figures['overloading_share']:.2%}" for figures in every))
    console.print(balance)
    for judged in table.judged:
        heavy = table.overloading(judged, symbols)
        if heavy:
            listed = Table(f"overloads on {judged.what}", "share of tokens", "alone / mean load")
            for key in heavy[:MOST_SHOWN]:
                listed.add_row(Text(key["key"]), f"{key['share']:.3%}", f"{key['over_mean']:.4f}")
            console.print(listed)
            if len(heavy) > MOST_SHOWN:
                console.print(f"and {len(heavy) - MOST_SHOWN:,} more")


def describe(table: JudgedTable) -> dict[str, str]:
    """Return a table's properties, by headings."""
    record, expert_HK = table.table.record, table.table.expert_HK
    keys_E = np.bincount(expert_HK.ravel(), minlength=record.num_experts)
    columns = "hash functions" if record.is_multi_hash else "experts a token"
    oracle = " (an oracle: it sees the token that is to be predicted)" if table.table.feature.is_oracle else ""
    return {
        "table": table.name,
        "builder": record.builder if record.seed is None else f"{record.builder}, seed {record.seed}",
        **{
            name.replace("_", " "): value[:12] if name.endswith("fingerprint") else _plain(value)
            for name, value in record.settings.items()
        },
        "feature": f"{table.table.feature}{oracle}",
        "experts": f"{record.num_experts:,}",
        columns: f"{expert_HK.shape[1]:,}",
        "rows": f"{len(expert_HK):,}",
        "different sets of experts": f"{table.sets_of_experts:,}",
        "rows that an expert serves": f"{int(keys_E.min()):,} to {int(keys_E.max()):,}",
        "fingerprint": table.table.fingerprint[:12],
    }


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _show_several(console: Console, tables: Sequence[JudgedTable]) -> None:
    shown = Table("table", "judged on", *HEADINGS.values(), "keys that overload")
    for column in shown.columns[2:]:
        column.justify = "right"
    shown.columns[0].overflow = "fold"
    for number, table in enumerate(tables):
        for judged in table.judged:
            figures = judged.figures()
            values = [f"{figures[key]:.4f}" for key in HEADINGS]
            shown.add_row(Text(table.name), judged.what, *values, f"{figures['overloading_keys']:,}")
        if number < len(tables) - 1:
            shown.add_section()
    console.print(shown)


def frame(tables: Sequence[JudgedTable]) -> "pd.DataFrame":
    """Return one row for each table and each set of counts on which it was judged."""
    import pandas as pd

    rows = []
    for table in tables:
        record, expert_HK = table.table.record, table.table.expert_HK
        facts = {"table": table.name, "builder": record.builder, "feature": str(table.table.feature)}
        facts |= {"experts": record.num_experts, "columns": expert_HK.shape[1], "rows": len(expert_HK)}
        rows += [facts | judged.figures() for judged in table.judged]
    return pd.DataFrame(rows)


def write(tables: Sequence[JudgedTable], symbols: list[str], out: Path) -> list[Path]:
    """Write loads.png, index.html, balance.csv and balance.json to a folder; return their paths."""
    from fairseq_hash.reporting.drawing import draw
    from fairseq_hash.reporting.theme import DARK, LIGHT
    from fairseq_hash.table_tools.figures import loads_of_one, loads_of_several

    charts = loads_of_one(tables[0]) if len(tables) == 1 else loads_of_several(tables)
    light, dark = (draw(charts, theme) for theme in (LIGHT, DARK))
    origin = provenance()
    contents = {
        "balance.csv": frame(tables).to_csv(index=False).encode(),
        "balance.json": json.dumps(_facts(tables, symbols, origin), indent=1).encode(),
        "loads.png": light,
        "index.html": _page(tables, symbols, origin, light, dark).encode(),
    }
    return write_folder(out, contents)


def _facts(tables: Sequence[JudgedTable], symbols: list[str], origin: dict[str, Any]) -> dict[str, Any]:
    def of_one(table: JudgedTable) -> dict[str, Any]:
        judged = [
            one.figures()
            | {"counts_fingerprint": one.fingerprint, "loads": one.balance.load_E.tolist()}
            | {"overloading": table.overloading(one, symbols)}
            for one in table.judged
        ]
        return table.record() | {"fingerprint": table.table.fingerprint, "judged": judged}

    return {"tables": [of_one(table) for table in tables], "provenance": origin}


def _page(tables: Sequence[JudgedTable], symbols: list[str], origin: dict[str, Any], light: bytes, dark: bytes) -> str:
    import pandas as pd

    from fairseq_hash.reporting import page

    names = ", ".join(table.name for table in tables)
    title = f"Hash table {names}" if len(tables) == 1 else "Hash tables compared"
    headings = {**HEADINGS, "overloading_keys": "keys that overload", "counts": "judged on"}
    balance = frame(tables).drop(columns=["entropy"])
    for name, form in {**dict.fromkeys(HEADINGS, "{:.4f}"), "overloading_share": "{:.2%}", "tokens": "{:,}"}.items():
        balance[name] = balance[name].map(form.format)
    balance = balance.rename(columns={**headings, "overloading_share": "their share of all tokens"})
    caption = "Line and points: the same experts." if len(tables) == 1 else "Each table's experts by its own loads."
    parts = [
        page.section("Balance", page.table(balance), page.paragraphs(MEANING)),
        page.section("Loads of the experts", page.figure(f"Sorted loads of {names}", caption, light, dark)),
    ]
    for table in tables:
        for judged in table.judged:
            heavy = pd.DataFrame(table.overloading(judged, symbols)[:ON_PAGE])
            if len(heavy):
                heavy = heavy.assign(share=heavy["share"].map("{:.3%}".format))
                heavy = heavy.assign(over_mean=heavy["over_mean"].map("{:.4f}".format)).drop(columns="row")
                heavy = heavy.rename(columns={"share": "share of tokens", "over_mean": "alone / mean load"})
                parts.append(page.section(f"What overloads {table.name} on {judged.what}", page.table(heavy)))
    records = pd.DataFrame([describe(table) for table in tables]).fillna("")
    parts.append(
        page.section(
            "Tables",
            page.table(
                records.T.reset_index().set_axis(
                    ["", *(f"table {number}" for number in range(1, len(tables) + 1))], axis=1
                ),
                words=True,
            ),
        )
    )
    origins = pd.DataFrame([(name, _plain(value)) for name, value in origin.items()], columns=["", "version or place"])
    parts.append(page.section("Where this comes from", page.table(origins, words=True)))
    return page.render(title, f"{len(symbols):,} symbols, {origin['date']}", parts)
