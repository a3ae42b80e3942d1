"""Files of experts' loads: CSV with the columns `layer`, `expert` and `load`, a line for each expert of each layer.

`layer` is the number of the decoder layer, `expert` a number from 0 to E - 1, and `load` a number of 0 or more in any
unit: rows, or shares of them. Further columns are ignored. `fairseq-hash plan --loads --out` writes such files.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import output_file

COLUMNS = ("layer", "expert", "load")


def read_loads(path: Path, num_experts: int) -> dict[int, np.ndarray]:
    """Return the loads of each layer's experts, float64 `[E]`, by the number of the decoder layer, ascending.

    Raises:
        UserError: if the file cannot be read, or a layer does not have one load for each of E experts, or none above 0.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            if not set(COLUMNS) <= set(lines.fieldnames or ()):
                raise UserError(f"{path} is no file of loads: its first line must name {', '.join(COLUMNS)}")
            rows = [_row(path, lines.line_num, line) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); give a file that fairseq-hash plan --loads wrote") from None
    loads: dict[int, dict[int, float]] = {}
    for layer, expert, load in rows:
        if expert in loads.setdefault(layer, {}):
            raise UserError(f"{path} has expert {expert} of layer {layer} twice; give each one load")
        loads[layer][expert] = load
    for layer, load_of in loads.items():
        if set(load_of) != set(range(num_experts)):
            raise UserError(
                f"{path} has {len(load_of)} experts in layer {layer}, this model has experts 0 to {num_experts - 1}; "
                "give the loads of a model with as many"
            )
        if not any(load_of.values()):
            raise UserError(f"{path} has no load above 0 in layer {layer}; give loads of a text")
    if not loads:
        raise UserError(f"{path} has no loads; give a file that fairseq-hash plan --loads wrote")
    return {layer: np.array([loads[layer][expert] for expert in range(num_experts)]) for layer in sorted(loads)}


def _row(path: Path, number: int, line: Mapping[str, str]) -> tuple[int, int, float]:
    try:
        layer, expert, load = int(line["layer"]), int(line["expert"]), float(line["load"])
    except (TypeError, ValueError):
        raise UserError(f"{path}, line {number}: layer and expert must be whole numbers, load a number") from None
    if not 0 <= load < math.inf:
        raise UserError(f"{path}, line {number}: the load {load} is out of range; give 0 or more")
    return layer, expert, load


def write_loads(path: Path, loads: Mapping[int, np.ndarray], rank_E: np.ndarray) -> None:
    """Write the loads of experts, `[E]` by layer, and the rank `[E]` of the group that holds each.

    Raises:
        UserError: if the file cannot be written.
    """
    with output_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow((*COLUMNS, "rank"))
        for layer, load_E in loads.items():
            for expert, load in enumerate(load_E.tolist()):
                lines.writerow((layer, expert, load, int(rank_E[expert])))
