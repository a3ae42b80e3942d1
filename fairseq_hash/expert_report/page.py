"""The report on a run's experts as files and in the terminal: page, figures, tables, JSON."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fairseq_hash.core.files import write_folder
from fairseq_hash.expert_report.report import ExpertReport
from fairseq_hash.provenance import provenance
from fairseq_hash.reporting import page
from fairseq_hash.reporting.charts import Chart, Line, figures_of, some
from fairseq_hash.reporting.drawing import draw, png, styled
from fairseq_hash.reporting.theme import DARK, LIGHT, Theme

OVERLAP = "overlap.png"
DIFFERENCES = "differences.png"
MOST_DRAWN = 4  # layers of a figure
MOST_SHOWN = 16  # experts of a layer in the terminal
NOTHING = "–"

OF_LAYERS = {
    **{"layer": "Layer", "router": "Router", "experts": "Experts", "load_max": "Largest load", "load_min": "Smallest"},
    **{"load_entropy": "Entropy of load", "dropped": "Dropped", "weight_cosine": "Cosine of weights"},
    **{
        "weight_distance": "Distance of weights",
        "output_cosine": "Cosine of outputs",
        "output_distance": "Distance of outputs",
    },
    "closest": "Closest experts",
}
MEASURES = {"share": "Most frequent expert", "explained": "Explained by token id", "nmi": "NMI"}
OF_EXPERTS = {"layer": "Layer", "router": "Router", "expert": "Expert", "tokens": "Tokens", "share": "Share"}
OF_EXPERTS |= {"kinds": "Token ids", "whole_kinds": "Of it alone", "frequent": "Frequent", "typical": "Typical"}
OF_HISTORY = {"layer": "Layer", "router": "Router", "update": "Updates", "checkpoint": "Checkpoint", **MEASURES}
OF_HISTORY |= {"as_last": "As the last checkpoint"}

LAYERS_NOTE = """Loads are over the mean load, before dropping. Cosines and distances are means over all pairs of
different experts: of all their weights as one vector, and of their outputs on the same inputs of the layer. A distance
is over the root mean square of the norms; unrelated vectors of one length have a cosine of 0 and a distance of 1.41.
The closest experts have the largest cosine of outputs."""
OVERLAP_NOTE = """Most frequent expert: the share of the choices that went to the expert which their token's id has most
often. Explained by token id: the mutual information of token id and expert over the entropy of the expert. NMI: twice
the mutual information over the sum of both entropies. A route by chance has the same tokens and loads, with its choices
shuffled: rare tokens alone make its figures larger than 0. A table has one expert for each token id (balanced on this
text)."""
EXPERTS_NOTE = """Token ids: how many different ones the expert serves; of it alone: those that no other expert serves
in this text. Typical tokens are those with the largest share in the mutual information: frequent, and more frequent
here than elsewhere."""


def files_of(report: ExpertReport) -> dict[str, bytes]:
    """Return the files of a report by name."""
    differences = {theme: draw_differences(report, theme) for theme in (LIGHT, DARK)}
    charts = overlap_charts(report)
    files = {"index.html": html(report, charts, differences).encode(), DIFFERENCES: differences[LIGHT]}
    if charts:
        files[OVERLAP] = draw(charts, LIGHT)
    files["experts.csv"] = report.experts.to_csv(index=False).encode()
    files["layers.csv"] = report.layers.to_csv(index=False).encode()
    files["checkpoints.csv"] = report.history.to_csv(index=False).encode()
    files["experts.json"] = json.dumps(as_json(report), indent=1, allow_nan=False).encode()
    return files


def write(report: ExpertReport, out: Path) -> list[Path]:
    """Write the files to a folder, and return their paths.

    Raises:
        UserError: if that fails.
    """
    return write_folder(out, files_of(report))


def as_json(report: ExpertReport) -> dict[str, Any]:
    """Return all numbers; NaN is null."""

    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return json.loads(frame.to_json(orient="records", double_precision=15))

    content: dict[str, Any] = {"run": str(report.run), "checkpoint": report.checkpoint.name, "update": report.update}
    content |= {"text": report.text, "tokens": report.tokens, "report": provenance()}
    content |= {"layers": records(report.layers), "experts": records(report.experts)}
    content["checkpoints"] = records(report.history)
    for name, of_layers in (("weights", report.weights), ("outputs", report.outputs)):
        content[name] = {
            str(layer): {"cosine": found.cosine_EE.tolist(), "distance": found.distance_EE.tolist()}
            for layer, found in of_layers.items()
        }
    return content


def title_of(report: ExpertReport) -> tuple[str, str]:
    """Return the heading and the line below it."""
    subtitle = f"{report.checkpoint.name}, after {report.update:,} updates; {report.tokens:,} tokens of {report.text}"
    return f"Experts of {report.run.resolve().name}", subtitle


def html(report: ExpertReport, charts: list[Chart], differences: dict[Theme, bytes]) -> str:
    """Return the page."""
    overlaps = [page.paragraphs(OVERLAP_NOTE), page.table(overlap_table(report), label="Routes and token ids")]
    if charts:
        overlaps.append(page.table(shown(report.history, OF_HISTORY), label="Over the checkpoints"))
        overlaps.append(figures_of(charts))
        overlaps.append(page.figure("Routes and token ids", "", *(draw(charts, theme) for theme in (LIGHT, DARK))))
    picture = page.picture(
        "Cosines between experts",
        "Cosines between each two experts: of their weights, and of their outputs on the same inputs.",
        *(differences[theme] for theme in (LIGHT, DARK)),
    )
    layers = page.table(shown(report.layers, OF_LAYERS), label="Sparse layers")
    experts = page.table(shown(report.experts, OF_EXPERTS), label="Experts", words=True)
    parts = [
        page.section("Do routes follow token ids?", *overlaps),
        page.section("How do experts differ?", page.paragraphs(LAYERS_NOTE), layers, picture),
        page.section("Which tokens does an expert serve?", page.paragraphs(EXPERTS_NOTE), experts),
    ]
    return page.render(*title_of(report), parts)


def overlap_table(report: ExpertReport) -> pd.DataFrame:
    """Return, for each layer, what its route has in common with token ids, beside chance and a table."""
    rows = []
    for line in report.layers.to_dict("records"):
        for name, suffix in ((line["router"], ""), ("by chance", "_chance"), ("a table", "_table")):
            row = {"Layer": str(line["layer"]), "Route": name}
            rows.append(row | {title: _text(what, line[f"{what}{suffix}"]) for what, title in MEASURES.items()})
    return pd.DataFrame(rows)


def overlap_charts(report: ExpertReport) -> list[Chart]:
    """Return the measures over the checkpoints, [] for one checkpoint."""
    updates = sorted(set(report.history["update"]))
    if len(updates) < 2:
        return []
    charts = []
    x = np.array([updates[0], updates[-1]], dtype=float)
    for what, title in MEASURES.items():
        lines = []
        for number, line in enumerate(report.layers.to_dict("records")):
            own = report.history[report.history["layer"] == line["layer"]]
            name = f"layer {line['layer']}, {line['router']}"
            lines.append(Line(name, "", own["update"].to_numpy(float), own[what].to_numpy(float), number, number))
            for other, suffix in (("by chance", "_chance"), ("a table", "_table")):
                level = np.full(2, line[f"{what}{suffix}"])
                lines.append(Line(f"{name}: {other}", "", x, level, number, number, "faint"))
        values = {line.name: f"{line.y[-1]:.2f}" for line in lines}
        charts.append(Chart(title, "Updates", title, lines, (0.0, 1.02 * x[1]), (0.0, 1.05), values=values))
    return charts


def draw_differences(report: ExpertReport, theme: Theme) -> bytes:
    """Return the cosines between experts as a PNG: a row for each layer, weights beside outputs. Of many, some."""
    layers = some(list(report.weights), MOST_DRAWN)
    routers = dict(zip(report.layers["layer"], report.layers["router"], strict=True))
    with styled(theme):
        figure = Figure(figsize=(10, 4.4 * len(layers)), layout="constrained")
        for row, layer in enumerate(layers):
            for column, (name, found) in enumerate((("weights", report.weights), ("outputs", report.outputs))):
                axes = figure.add_subplot(len(layers), 2, 2 * row + column + 1)
                image = axes.imshow(found[layer].cosine_EE, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
                axes.set_title(f"Layer {layer}, {routers[layer]}: cosines of {name}")
                axes.set(xlabel="Expert", ylabel="Expert")
                axes.grid(visible=False)
                figure.colorbar(image, ax=axes, shrink=0.85)
        return png(figure)


def shown(frame: pd.DataFrame, headings: dict[str, str]) -> pd.DataFrame:
    """Return the columns with these headings, as text for people."""
    return pd.DataFrame({title: [_text(name, value) for value in frame[name]] for name, title in headings.items()})


def _text(name: str, value: Any) -> str:
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return NOTHING
        return f"{100 * value:.1f}%" if name in ("share", "explained", "dropped", "as_last") else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value) or NOTHING


def print_report(report: ExpertReport, console: Any) -> None:
    """Print the tables; of a layer with many experts, those with the largest loads."""
    title, subtitle = title_of(report)
    console.print(title, style="bold")
    console.print(subtitle)
    _print_table("How experts differ", shown(report.layers, OF_LAYERS), console)
    _print_table("Routes and token ids", overlap_table(report), console)
    if report.history["update"].nunique() > 1:
        _print_table("Over the checkpoints", shown(report.history, OF_HISTORY), console)
    largest = report.experts.sort_values("tokens", ascending=False, kind="stable").groupby("layer").head(MOST_SHOWN)
    largest = largest.sort_values(["layer", "expert"])
    few = " (of each layer those with the largest loads)" if len(largest) < len(report.experts) else ""
    _print_table(f"Which tokens an expert serves{few}", shown(largest, OF_EXPERTS), console)


def _print_table(title: str, content: pd.DataFrame, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    numbers = {"Layer", "Expert", "Tokens", "Share", "Updates", "Experts"}
    for name in content.columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for cells in content.to_numpy().tolist():
        table.add_row(*map(Text, cells))
    console.print(table)
