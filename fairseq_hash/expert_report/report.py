"""The report on the experts of one run: numbers as tables. `page` makes files of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from fairseq_hash.api import LanguageModel
from fairseq_hash.core.errors import UserError
from fairseq_hash.expert_report.checkpoints import by_update, updates_of
from fairseq_hash.expert_report.differences import Difference, of_outputs, of_weights
from fairseq_hash.expert_report.overlap import agreement, by_chance, by_table, overlap
from fairseq_hash.expert_report.routed import RoutedLayer, routed_layers

EXAMPLES = 8  # tokens of each expert


@dataclass(eq=False)
class ExpertReport:
    """What is known of the experts of a run.

    Attributes:
        run: the folder.
        checkpoint: the one that layers and experts are of, and the updates after which it was saved.
        text: what was read, and how many tokens of it, the start symbol included.
        layers: a line for each sparse layer.
        experts: a line for each expert.
        history: a line for each checkpoint and layer; one checkpoint may be all there is.
        weights, outputs: how the experts of a layer differ, by its number.
    """

    run: Path
    checkpoint: Path
    update: int
    text: str
    tokens: int
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    experts: pd.DataFrame = field(default_factory=pd.DataFrame)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    weights: dict[int, Difference] = field(default_factory=dict)
    outputs: dict[int, Difference] = field(default_factory=dict)


def make_report(
    folder: Path,
    main: Path,
    load: Callable[[Path], LanguageModel],
    read_text: Callable[[LanguageModel], tuple[str, np.ndarray]],
    length: "int | None" = None,
    tell: Callable[[str], object] = lambda line: None,
) -> ExpertReport:
    """Look at the experts of a run's checkpoint, and at its routes over all checkpoints.

    Args:
        folder: of the run.
        main: the checkpoint that layers and experts are of.
        load: loads a checkpoint.
        read_text: returns the name of a text and its token ids, int64 `[S]`, by a model's dictionary.
        length: tokens of a sample; None: those of the training.
        tell: is called with a line for each checkpoint.

    Raises:
        UserError: if the run is dense, or a checkpoint or the text cannot be used.
    """
    from fairseq_hash.api.route_counts import sample_length

    model = load(main)
    if not model.num_experts:
        raise UserError(f"{folder} is a dense run: it has no experts; give a run with --sparse-layers and --router")
    length = sample_length(model, length)
    source, token_S = read_text(model)
    update = updates_of(main)
    report = ExpertReport(folder, main, update, source, len(token_S) + 1)
    vocabulary, symbols = len(model.dictionary), model.dictionary.symbols
    tell(f"{main.name}: {report.tokens:,} tokens of {source}")
    layers = routed_layers(model, token_S, length)
    for one in layers:
        report.weights[one.place.number] = of_weights(one.layer)
        report.outputs[one.place.number] = of_outputs(one.layer, one.x_MD)
    report.layers = pd.DataFrame([_layer(one, report, vocabulary) for one in layers])
    report.experts = pd.DataFrame([line for one in layers for line in _experts(one, symbols)])
    pairs = {update: {one.place.number: one.pairs for one in layers}}
    routers = {one.place.number: one.place.router for one in layers}
    del model, layers  # one model in memory at a time
    paths = by_update(folder, main)
    for number, path in paths.items():
        if number not in pairs:
            tell(f"{path.name}: its routes after {number:,} updates")
            pairs[number] = {one.place.number: one.pairs for one in routed_layers(load(path), token_S, length)}
    last = pairs[max(paths)]
    report.history = pd.DataFrame(
        [
            {"layer": layer, "router": routers[layer], "update": number, "checkpoint": paths[number].name}
            | vars(overlap(pairs[number][layer]))
            | {"as_last": agreement(pairs[number][layer], last[layer], vocabulary)}
            for layer in routers
            for number in paths
        ]
    )
    return report


def _layer(one: RoutedLayer, report: ExpertReport, vocabulary: int) -> dict[str, object]:
    load_E = one.load_E
    relative_E = load_E / load_E.mean()
    share_E = load_E[load_E > 0] / load_E.sum()
    weights, outputs = report.weights[one.place.number], report.outputs[one.place.number]
    line: dict[str, object] = {"layer": one.place.number, "router": one.place.router, "experts": one.experts}
    line |= {"load_max": relative_E.max(), "load_min": relative_E.min()}
    line["load_entropy"] = float(-(share_E * np.log(share_E)).sum() / np.log(one.experts)) if one.experts > 1 else 1.0
    line["dropped"] = one.dropped / one.pairs.total
    routes = {
        "": one.pairs,
        "_chance": by_chance(one.pairs),
        "_table": by_table(one.pairs, vocabulary, one.experts),
    }
    for name, pairs in routes.items():
        line |= {f"{what}{name}": value for what, value in vars(overlap(pairs)).items()}
    line |= {"weight_cosine": weights.mean_cosine, "weight_distance": weights.mean_distance}
    line |= {"output_cosine": outputs.mean_cosine, "output_distance": outputs.mean_distance}
    closest = outputs.closest
    line["closest"] = "" if closest is None else f"{closest[0]} and {closest[1]}"
    return line


def _experts(one: RoutedLayer, symbols: list[str]) -> list[dict[str, object]]:
    pairs, load_E = one.pairs, one.load_E
    count_V = np.bincount(pairs.token_P, pairs.count_P, len(symbols))
    lines = []
    for expert in range(one.experts):
        is_ours = pairs.expert_P == expert
        token_N, count_N = pairs.token_P[is_ours], pairs.count_P[is_ours]
        # What a token adds to what the expert says of token ids: many occurrences, more than at other experts.
        expected_N = count_V[token_N] * (load_E[expert] / pairs.total)
        typical_N = count_N * np.log(count_N / expected_N) if len(count_N) else count_N
        line: dict[str, object] = {"layer": one.place.number, "router": one.place.router, "expert": expert}
        line |= {"tokens": int(load_E[expert]), "share": load_E[expert] / pairs.total, "kinds": len(token_N)}
        line |= {"whole_kinds": int((count_N == count_V[token_N]).sum())}
        line["frequent"] = _named(token_N, count_N, symbols)
        line["typical"] = _named(token_N[typical_N > 0], typical_N[typical_N > 0], symbols)
        lines.append(line)
    return lines


def _named(token_N: np.ndarray, value_N: np.ndarray, symbols: list[str]) -> str:
    order = np.argsort(-value_N, kind="stable")[:EXAMPLES]
    return " ".join(symbols[token] for token in token_N[order])
