"""`--expert-placement` and `--expert-replicas`: which experts share a rank, and which have copies on several ranks.

Both are chosen by the experts' loads in the layers of a model.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from fairseq.tasks import FairseqTask

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import HashTable
from fairseq_hash.hashing.balance import expert_loads
from fairseq_hash.hashing.dictionary import PADDING
from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.lm.line_ends import counts_with_line_ends
from fairseq_hash.lm.table_buffers import hash_tables
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.load_files import read_loads
from fairseq_hash.parallel.placement import BALANCED, CONTIGUOUS, balanced_order, lower_bound, rank_loads

logger = logging.getLogger("fairseq_hash.model")

Loads = Mapping[int, np.ndarray]  # of the experts `[E]` of a layer, by the number of its decoder layer


def placed(
    parallel: ExpertParallel, options: SparseOptions, decoder_layers: int, task: FairseqTask, positions: int
) -> ExpertParallel:
    """Return who holds which experts by `--expert-placement` and `--expert-replicas`; log how even the ranks are.

    `positions` is the length of the longest sample.

    Raises:
        UserError: if there is nothing to place, or the loads are not known.
    """
    if options.expert_placement == CONTIGUOUS:
        return parallel
    check_placement(parallel, options.expert_placement, options.expert_replicas)
    if options.expert_placement == BALANCED:
        tables = tables_of(options, decoder_layers, task, positions)
        loads = token_loads(tables, counts_of(task, "--expert-placement balanced"), "--expert-placement balanced")
    else:
        loads = loads_of_file(options, decoder_layers)
    parallel = place(parallel, loads, options.expert_replicas)
    logger.info("expert_placement | %s", evenness(loads, parallel))
    return parallel


def place(parallel: ExpertParallel, loads: Loads, replicas: int = 0) -> ExpertParallel:
    """Return who holds which experts, with so many replicas, where ranks are as even as loads allow."""
    return parallel.placed(balanced_order(np.stack(list(loads.values())), parallel.size, replicas))


def check_placement(parallel: ExpertParallel, name: str, replicas: int = 0) -> None:
    """Raise `UserError` if a placement is asked for that has nothing to choose, or replicas that ranks cannot share."""
    size, experts = parallel.size, parallel.num_experts
    if parallel.is_shared and replicas % size:
        raise UserError(
            f"--expert-replicas {replicas} cannot be shared evenly by the {size} ranks of a group; give a multiple of "
            f"{size}"
        )
    if parallel.is_shared and replicas > experts * (size - 1):
        raise UserError(
            f"--expert-replicas {replicas} are more than {experts * (size - 1)}, with which each of the {size} ranks "
            f"of a group holds all {experts} experts; give fewer, or --expert-parallel-size 1 without them"
        )
    if name == CONTIGUOUS or (parallel.is_shared and (replicas or parallel.local_experts > 1)):
        return
    held = f"each of {parallel.size} holds one" if parallel.is_shared else f"each of {parallel.world_size} holds all"
    raise UserError(
        f"--expert-placement {name} chooses which experts share a rank; here {held}: leave it out (the result is the "
        "same), or use another number of ranks"
    )


def loads_of_file(options: SparseOptions, decoder_layers: int) -> dict[int, np.ndarray]:
    """Return the loads in the file that `--expert-placement` names.

    Raises:
        UserError: if it is no file of loads, or has those of a layer that is not sparse in this model.
    """
    path = Path(options.expert_placement)
    loads = read_loads(path, options.num_experts)
    if other := sorted(set(loads) - set(options.layer_numbers(decoder_layers))):
        raise UserError(
            f"{path} has loads of layer {other[0]}, which has no experts in this model (--sparse-layers "
            f"{options.sparse_layers}); give the loads of such a model"
        )
    return loads


def tables_of(options: SparseOptions, decoder_layers: int, task: FairseqTask, positions: int) -> dict[int, HashTable]:
    """Return the table of each hash layer, by the number of its decoder layer; layers may share one.

    Raises:
        UserError: where a table cannot be built.
    """
    symbols, counts = task.source_dictionary.symbols, task.source_dictionary.count
    if options.hash_count_eos:
        counts = counts_with_line_ends(task)
    numbers = [number for number, router in options.layer_routers(decoder_layers).items() if router == "hash"]
    shape = options.table_shape(options.num_experts, positions)
    tables = [table for _, table in hash_tables(options, symbols, counts, shape, len(numbers))]
    return dict(zip(numbers, tables if len(tables) > 1 else tables * len(numbers), strict=True))


def counts_of(task: FairseqTask, option: str) -> np.ndarray:
    """Return how often each token is an input in the training text, int64 `[V]`: no padding, and every end of a line.

    Raises:
        UserError: if the text is not there. `option` is the one that asks for it.
    """
    count_V = np.array(counts_with_line_ends(task, option), dtype=np.int64)
    count_V[PADDING] = 0
    return count_V


def token_loads(tables: Mapping[int, HashTable], count_V: np.ndarray, option: str) -> dict[int, np.ndarray]:
    """Return the loads that each layer's table gives its experts, int64, for tokens that occur so often.

    Raises:
        UserError: if a table's rows are not the dictionary's symbols. `option` is the one that asks for loads.
    """
    for table in tables.values():
        if table.index or table.record.feature not in OF_TOKENS or table.record.feature == "predicted":
            what = "pairs of tokens" if "pair" in table.index else table.feature
            raise UserError(
                f"{option}: a dictionary does not count the keys of a hash table of {what}; count them in a text or a "
                "run by fairseq-hash plan --loads --text DATA or --from-run RUN (with --out FILE, for "
                "--expert-placement FILE)"
            )
    return {layer: expert_loads(table.expert_HK, count_V, table.record.num_experts) for layer, table in tables.items()}


def evenness(loads: Loads, parallel: ExpertParallel) -> str:
    """Return for the log how even the ranks of a group are by some loads; layers of equal loads together."""
    alike: dict[bytes, list[int]] = {}
    for layer, load_E in loads.items():
        alike.setdefault(load_E.tobytes(), []).append(layer)
    lines = []
    for layers in alike.values():
        load_E = loads[layers[0]]
        here, before, bound = over_mean(load_E, parallel)
        before_it = f"contiguous {before:.3f}"
        if parallel.num_replicas:
            alone, _, _ = over_mean(load_E, place(replace(parallel, order=None), loads))
            before_it += f", placed without replicas {alone:.3f}"
        names = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        lines.append(f"{names} {here:.3f} ({before_it}, no placement below {bound:.3f})")
    with_replicas = f" with {parallel.num_replicas} replicas" if parallel.num_replicas else ""
    return f"load of the largest rank over the mean{with_replicas}: {'; '.join(lines)}"


def over_mean(load_E: np.ndarray, parallel: ExpertParallel) -> tuple[float, float, float]:
    """Return the largest rank's load over the mean, the same of contiguous experts, and a bound of any placement.

    The bound is that of placements with as many replicas.
    """
    mean = load_E.sum() / parallel.size
    here, before = (rank_loads(load_E, order, parallel.size).max() / mean for order in (parallel.order, None))
    return float(here), float(before), float(lower_bound(load_E, parallel.size, parallel.num_replicas) / mean)
