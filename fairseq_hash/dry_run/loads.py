"""A dry run with uneven experts: each gets rows by its load in a file, and the fullest rank is looked at.

Shape suffixes: see `moe.losses`; here also P ranks of a group, L layers, G groups of rows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.known_rows import RowsOf
from fairseq_hash.experiments.compose import Experiment
from fairseq_hash.experiments.memory import place_of
from fairseq_hash.lm.placement import place
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.load_files import read_loads
from fairseq_hash.parallel.placement import CONTIGUOUS, rank_loads


@dataclass(frozen=True)
class PlacedLoads:
    """Loads of experts, and who holds which.

    Attributes:
        experiment: the one that was asked for, with consecutive experts: its rows come by slot already.
        place: who holds which experts by the placement that was asked for.
        rows: of each slot.
        fullest: the rank with the most rows.
        factor: its rows over the mean.
    """

    experiment: Experiment
    place: ExpertParallel
    rows: RowsOf
    fullest: int
    factor: float

    @classmethod
    def of(cls, experiment: Experiment, ranks: int, path: Path) -> "PlacedLoads":
        """Read the loads of a model's experts. Layers of different loads count alike: rows go by their mean.

        Raises:
            UserError: if the file cannot be used, or nothing is shared.
        """
        config = experiment.config
        options = SparseOptions.from_config(config.model)
        parallel = place_of(config, ranks)
        if not parallel.is_shared:
            raise UserError(f"--load-file {path} says who waits for whom; with --ranks {ranks} no experts are shared")
        loads = read_loads(path, options.num_experts)
        if options.expert_placement != CONTIGUOUS:
            parallel = place(parallel, loads)
        load_E = np.mean([load_E / load_E.sum() for load_E in loads.values()], axis=0)
        load_P = rank_loads(load_E, parallel.order, parallel.size)
        changed = OmegaConf.create(OmegaConf.to_container(config))
        if "expert_placement" in changed.model:
            changed.model.expert_placement = CONTIGUOUS
        load_S = load_E if parallel.order is None else load_E[list(parallel.order)]
        factor = float(load_P.max() / load_P.mean())
        return cls(replace(experiment, config=changed), parallel, rows_by(load_S), int(load_P.argmax()), factor)


def rows_by(load_E: np.ndarray) -> RowsOf:
    """Return the rows of each group by loads, whole numbers that add up: the largest fractions are rounded up."""

    def rows(ranks: int, groups: int, choices: int) -> list[list[int]]:
        share_G = np.repeat(load_E / load_E.sum(), groups // len(load_E)) / (groups // len(load_E))
        exact_G = share_G * choices
        rows_G = np.floor(exact_G).astype(int)
        left_G = np.argsort(rows_G - exact_G, kind="stable")[: choices - rows_G.sum()]
        rows_G[left_G] += 1
        return [rows_G.tolist()] * ranks

    return rows
