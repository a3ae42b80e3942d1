"""The loads of an experiment's experts and ranks, before it runs: from counts, from batches of a text, or from a run.

Shape suffixes: see `moe.losses`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, OmegaConf

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.checks import check_data, check_files
from fairseq_hash.experiments.compose import Experiment
from fairseq_hash.experiments.memory import place_of
from fairseq_hash.hashing import HashTable, dictionary_fingerprint
from fairseq_hash.hashing.dictionary import PADDING, read_dictionary
from fairseq_hash.lm.placement import Loads, counts_of, loads_of_file, over_mean, place, tables_of, token_loads
from fairseq_hash.lm.table_buffers import TableBuffers
from fairseq_hash.moe.planned_loads import RoutedBatches, choices, drawn_batches
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.placement import BALANCED, CONTIGUOUS
from fairseq_hash.reporting.comparison_table import settled_intervals
from fairseq_hash.reporting.runs import load_run

QUANTILE = 0.95  # of the stragglers of all passes
SEED = 1  # of drawn batches


@dataclass(frozen=True, eq=False)
class PlannedLoads:
    """What is known of the loads of an experiment.

    Attributes:
        source: where they come from, for people.
        loads: of the experts of each layer.
        placements: who holds which experts, by the name of the placement; the experiment's own comes first.
        batches: by the tokens of a rank's batch, the routed batches of each layer; layers may share them.
        capacity_factor: of the training.
    """

    source: str
    loads: Loads
    placements: dict[str, ExpertParallel]
    batches: dict[int, dict[int, RoutedBatches]] = field(default_factory=dict)
    capacity_factor: float = 0.0

    @property
    def place(self) -> ExpertParallel:
        """Who holds which experts in this experiment."""
        return next(iter(self.placements.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each set of layers with one table, placement and size of a batch, ready for a table.

        `expert`, `rank` and `bound` are the largest load over the mean, of an expert, of a rank, and of the fullest
        rank in any placement. `straggler` is the mean over passes, `straggler_95` their quantile, `dropped` a share.
        """
        rows = []
        for layers in self._alike():
            load_E = self.loads[layers[0]]
            for name, parallel in self.placements.items():
                rank, _, bound = over_mean(load_E, parallel)
                about = {"layers": layers, "placement": name, "expert": float(load_E.max() / load_E.mean())}
                about |= {"rank": rank, "bound": bound}
                rows += [
                    about | self._of_batches(of[layers[0]], tokens, parallel) for tokens, of in self.batches.items()
                ]
                rows += [] if self.batches else [about]
        return rows

    def _of_batches(self, batches: RoutedBatches, tokens: int, parallel: ExpertParallel) -> dict[str, Any]:
        stragglers = batches.stragglers(parallel, self.capacity_factor)
        return {
            "tokens": tokens,
            "passes": len(stragglers),
            "straggler": float(stragglers.mean()),
            "straggler_95": float(np.quantile(stragglers, QUANTILE)),
            "dropped": batches.dropped_share(self.capacity_factor),
        }

    def _alike(self) -> list[tuple[int, ...]]:
        """Return the layers by sets of those that share their batches: their table. Those of a run stay apart."""
        alike: dict[Any, list[int]] = {}
        for layer in self.loads:
            alike.setdefault(next((id(of[layer]) for of in self.batches.values()), layer), []).append(layer)
        return [tuple(layers) for layers in alike.values()]


def planned_loads(
    experiment: Experiment,
    ranks: int,
    batch_tokens: Sequence[int] = (),
    passes: int = 200,
    text: "tuple[Path, str] | None" = None,
) -> PlannedLoads:
    """Return the loads of an experiment's hash layers.

    Args:
        experiment: with data that is there.
        ranks: W.
        batch_tokens: the most tokens of a rank's batch, one or several; none: as the experiment has it.
        passes: the most forward passes of a group to look at.
        text: folder of a binarized text and its subset. Its batches are those that training would cut and shuffle in
            its first epoch. None: the counts of the training text, and tokens drawn by them, independently.

    Raises:
        UserError: if there is no hash layer, or counts, text or a table cannot be used.
    """
    config = experiment.config
    options = SparseOptions.from_config(config.model)
    options.check()
    if "hash" not in options.routers:
        raise UserError(
            f"{experiment.name} has no hash layer, and where a learned router sends tokens is not known before a run; "
            "give one that logged its loads (--from-run RUN, trained with --log-expert-loads)"
        )
    parallel = place_of(config, ranks)
    sizes = tuple(batch_tokens) or (config.dataset.max_tokens,)
    if (least := min(sizes)) < config.task.tokens_per_sample:
        raise UserError(
            f"--batch-tokens {least} holds no sample of task.tokens_per_sample={config.task.tokens_per_sample}; give "
            "more"
        )
    check_data(config.task.data, ())
    check_files(experiment, options)
    task = _task(config)
    tables = tables_of(options, config.model.decoder_layers, task, config.task.tokens_per_sample)
    batches: dict[int, dict[int, RoutedBatches]]
    if text is None:
        count_V = counts_of(task, "--loads without --text")
        loads: Loads = token_loads(tables, count_V, "--loads")
        batches = {tokens: _drawn(tables, count_V, tokens, passes * parallel.size) for tokens in sizes}
        source = f"{int(count_V.sum()):,} tokens of the training text; in each batch, tokens drawn independently by "
        source += f"their counts (seed {SEED}), which vary less than text"
    else:
        batches = {tokens: _of_text(config, text, tables, tokens, passes * parallel.size) for tokens in sizes}
        loads = {layer: of.load_E for layer, of in batches[sizes[0]].items()}
        one = next(iter(tables))
        count = int(loads[one].sum()) // tables[one].expert_HK.shape[1]
        source = f"{count:,} tokens of {text[0]}/{text[1]}, in the batches that training cuts and shuffles"
    placements = _placements(options, config, parallel, task, tables, loads)
    return PlannedLoads(source, loads, placements, batches, options.capacity_factor)


def loads_of_run(experiment: Experiment, ranks: int, folder: Path) -> PlannedLoads:
    """Return the loads that a run logged with `--log-expert-loads`, as shares of each layer: the mean over the run.

    Raises:
        UserError: if it logged none, or those of other experts.
    """
    config = experiment.config
    options = SparseOptions.from_config(config.model)
    if options.expert_placement == BALANCED:
        raise UserError(f"--expert-placement {BALANCED} is by hash tables, --from-run by a run; leave one of them out")
    parallel = place_of(config, ranks)
    run, loads = load_run(folder), {}
    for layer in options.layer_numbers(config.model.decoder_layers):
        logged = [values[key] for values in settled_intervals(run) if (key := f"layer{layer}_load") in values]
        if not logged or len(logged[0]) != options.num_experts:
            found = f"those of {len(logged[0])} experts" if logged else "no loads"
            raise UserError(
                f"{folder} has {found} of layer {layer}, {experiment.name} has {options.num_experts} experts there; "
                "give a run of this model, trained with --log-expert-loads"
            )
        loads[layer] = np.mean(logged, axis=0)
    placements = {CONTIGUOUS: parallel, "by this run": place(parallel, loads)}
    return PlannedLoads(
        f"the loads that {folder} logged, without its first tenth",
        loads,
        _own_first(placements, options, config, parallel),
    )


def _placements(
    options: SparseOptions,
    config: DictConfig,
    parallel: ExpertParallel,
    task: LanguageModelingTask,
    tables: Mapping[int, HashTable],
    loads: Loads,
) -> dict[str, ExpertParallel]:
    """Return the placements to compare; the experiment's own comes first."""
    placements = {CONTIGUOUS: parallel}
    if parallel.is_shared and (parallel.local_experts > 1 or options.expert_replicas):
        try:
            counted = token_loads(tables, counts_of(task, "--expert-placement balanced"), "--expert-placement balanced")
            name = BALANCED
        except UserError:
            if options.expert_placement == BALANCED:
                raise
            counted, name = dict(loads), "by this text"
        if parallel.local_experts > 1:
            placements[name] = place(parallel, counted)
        if options.expert_placement == BALANCED and options.expert_replicas:
            placements[_own_name(options)] = place(parallel, counted, options.expert_replicas)
    return _own_first(placements, options, config, parallel)


def _own_first(
    placements: Mapping[str, ExpertParallel], options: SparseOptions, config: DictConfig, parallel: ExpertParallel
) -> dict[str, ExpertParallel]:
    """Return placements in another order: the experiment's own first, which may be by a file."""
    own = _own_name(options)
    if own in placements:
        return {own: placements[own], **placements}
    loads = loads_of_file(options, config.model.decoder_layers)
    by_file = {own: place(parallel, loads, options.expert_replicas)}
    if options.expert_replicas and parallel.local_experts > 1:
        by_file[options.expert_placement] = place(parallel, loads)
    return {**by_file, **placements}


def _own_name(options: SparseOptions) -> str:
    """Return the name of an experiment's placement: that of `--expert-placement`, or how many replicas it has."""
    return f"{options.expert_replicas} replicas" if options.expert_replicas else options.expert_placement


def _task(config: DictConfig, data: "Path | None" = None) -> LanguageModelingTask:
    """Return the task of an experiment, with its data or with other data."""
    changed = OmegaConf.create(OmegaConf.to_container(config.task))
    if data is not None:
        changed.data = str(data)
    return LanguageModelingTask.setup_task(changed)


def _drawn(tables: Mapping[int, HashTable], count_V: np.ndarray, tokens: int, batches: int) -> dict[int, RoutedBatches]:
    drawn: dict[int, RoutedBatches] = {}  # by table: layers may share one
    for table in tables.values():
        if id(table) not in drawn:
            of = (table.expert_HK, count_V, table.record.num_experts, table.record.is_multi_hash)
            drawn[id(table)] = drawn_batches(*of, tokens, batches, np.random.default_rng(SEED))
    return {layer: drawn[id(table)] for layer, table in tables.items()}


def _of_text(
    config: DictConfig, text: tuple[Path, str], tables: Mapping[int, HashTable], tokens: int, most: int
) -> dict[int, RoutedBatches]:
    """Return where the tokens of a text's batches go."""
    for table in tables.values():
        if table.record.feature == "predicted":
            raise UserError("--text: a table of predicted tokens needs the model that predicts them; leave it out")
    distinct = {id(table): TableBuffers(table) for table in tables.values()}
    found: dict[int, list[np.ndarray]] = {key: [] for key in distinct}
    for token_BL in islice(batches_of_text(config, *text, tokens), most):
        real_BL = token_BL != PADDING
        for key, table in distinct.items():
            count_H = np.bincount(table.rows(token_BL, PADDING, None)[real_BL].numpy(), minlength=len(table.expert))
            expert_HK = table.expert.numpy()
            found[key].append(choices(expert_HK, count_H, table.num_experts, table.is_multi_hash))
    routed = {
        key: RoutedBatches(np.stack(found[key]), table.expert.shape[1] if table.is_multi_hash else 1)
        for key, table in distinct.items()
    }
    return {layer: routed[id(table)] for layer, table in tables.items()}


def batches_of_text(config: DictConfig, folder: Path, subset: str, tokens: int) -> Iterator[Any]:
    """Yield the inputs (int64 tensors `[B, L]`, with padding) of a training's first epoch over a text, all ranks'.

    In their order: of W ranks, rank r takes batches r, r + W, ... `tokens` are the most of a batch (`--max-tokens`).

    Raises:
        UserError: if the text is not there, or belongs to another dictionary than the experiment's data.
    """
    check_data(str(folder), (subset,))
    here, data = (Path(place) / "dict.txt" for place in (folder, utils.split_paths(config.task.data)[0]))
    if dictionary_fingerprint(read_dictionary(here)[0]) != dictionary_fingerprint(read_dictionary(data)[0]):
        raise UserError(f"--text {folder} belongs to another dictionary than task.data={data.parent}; give one of both")
    task = _task(config, folder)
    task.load_dataset(subset)
    dataset = config.dataset
    epoch = task.get_batch_iterator(  # as `Trainer.get_train_iterator` asks for it
        task.dataset(subset),
        max_tokens=tokens,
        max_sentences=dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), config.task.tokens_per_sample, tokens),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=dataset.required_batch_size_multiple,
        seed=config.common.seed,
        epoch=1,
    ).next_epoch_itr(shuffle=dataset.curriculum < 1)
    for batch in epoch:
        yield batch["net_input"]["src_tokens"]
