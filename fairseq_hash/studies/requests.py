"""From a run of a study to the request that a worker takes: its composed configuration, command and identity."""

import functools
import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.checks import check_experiment
from fairseq_hash.experiments.compose import Experiment, compose
from fairseq_hash.experiments.flags import flags
from fairseq_hash.experiments.sizes import Sizes, sizes
from fairseq_hash.reporting.run_options import VOLATILE
from fairseq_hash.studies.commands import run_command
from fairseq_hash.studies.definition import Study, StudyModel, folder_name
from fairseq_hash.studies.records import FINAL, RunRecord, identity_of
from fairseq_hash.studies.schedule import Done, Run, choose, tuning_run, wanted
from fairseq_hash.studies.worker import Request

NEVER = 1_000_000_000
# Options that a run has apart from its model's, or that change no result.
OF_A_RUN = (VOLATILE - {"max_update", "max_epoch"}) | {"lr", "save_interval", "save_interval_updates"}


@dataclass(frozen=True)
class Places:
    """Where a study finds and leaves things.

    Attributes:
        configs: folder of the configurations.
        data: folder of the binarized data.
        fingerprint: of that data.
        vocabulary: symbols of its dictionary without fairseq's four special ones.
        runs: folder of the run folders.
        records: folder of the runs' records.
        overrides: of every model's configuration, such as cluster=gpu.
        threads: of one training; None for one on each core where it runs.
    """

    configs: Path
    data: Path
    fingerprint: str
    vocabulary: int
    runs: Path
    records: Path
    overrides: tuple[str, ...]
    threads: "int | None"


class Requests:
    """Makes requests of a study's runs. Composing a configuration takes some tenths of a second, so they are kept."""

    def __init__(self, study: Study, places: Places) -> None:
        self.study, self.places = study, places
        self.composed = functools.cache(self._composed)
        self.sizes = functools.cache(self._sizes)
        self.options = functools.cache(self._options)

    def _composed(self, name: str) -> Experiment:
        return self._compose(name, self.study.learning_rates[0], self.study.tuning_seed, "made of another model")

    def _compose(self, name: str, rate: float, seed: int, table: str) -> Experiment:
        """Return a model's configuration. Rate and seed are composed with it: other groups refer to them."""
        model = self.study.models[name]
        text, places = self.study.text, self.places
        words = [*model.overrides, *places.overrides, f"task.data={_quoted(places.data)}"]
        words += [f"experiment.vocabulary={places.vocabulary}", f"optimization.lr=[{rate!r}]", f"common.seed={seed}"]
        if model.table_of:
            words.append(f"model.hash_table={_quoted(table)}")
        experiment = compose(places.configs, model.experiment, words)
        config = experiment.config
        updates = max(1, text.train_tokens // tokens_per_update(experiment))
        every = -(-updates // self.study.validations)
        OmegaConf.set_struct(config, False)
        config.optimization.max_update = updates
        for group in ("lr_scheduler", "optimizer"):
            if "total_num_update" in config[group]:
                config[group].total_num_update = updates
        if "warmup_updates" in config.lr_scheduler:
            config.lr_scheduler.warmup_updates = min(config.lr_scheduler.warmup_updates, max(1, updates // 4))
        config.dataset.validate_interval_updates = config.checkpoint.save_interval_updates = every
        config.dataset.validate_interval = config.checkpoint.save_interval = NEVER  # epochs
        config.checkpoint.no_epoch_checkpoints = True
        config.checkpoint.keep_interval_updates = 1
        config.common.log_interval = max(1, updates // 40)
        config.common.user_dir = str(Path(fairseq_hash.__file__).parent)
        return experiment

    def table_path(self, model: StudyModel, done: Done) -> Path:
        """Return where a model's made table lies."""
        made_of = {"run": self.identity(self.source(model, done), done), "words": model.table}
        return self.places.runs / folder_name(model.name) / f"table-{identity_of(made_of)[:8]}.safetensors"

    def folder(self, run: Run, done: Done) -> Path:
        """Return a run's folder. Its name has digits of the identity: other options or data are another run."""
        name = f"{_rate_and_seed(run)}-{self.identity(run, done)[:8]}"
        return self.places.runs / folder_name(run.model) / name

    def record_path(self, run: Run) -> Path:
        """Return the file of a run's record."""
        return self.places.records / f"{folder_name(run.model)}-{_rate_and_seed(run)}.json"

    def config(self, run: Run, done: Done) -> DictConfig:
        """Return a run's configuration."""
        model = self.study.models[run.model]
        table = str(self.table_path(model, done)) if model.table_of else ""
        config = self._compose(run.model, run.learning_rate, run.seed, table).config
        config.checkpoint.save_dir = str(self.folder(run, done))
        return config

    def identity(self, run: Run, done: Done) -> str:
        """Return what tells a run from others.

        Options with their defaults are no part of it, so that a version with more options still knows its records.
        """
        model = self.study.models[run.model]
        options = self.options(run.model)
        made_table: list[str] = []
        if model.table_of:
            options = {key: value for key, value in options.items() if key != "hash_table"}  # a path
            made_table = [self.identity(self.source(model, done), done), *model.table]
        known = {"options": options, "table": made_table, "data": self.places.fingerprint}
        return identity_of({**known, "seed": run.seed, "learning_rate": run.learning_rate})

    def source(self, model: StudyModel, done: Done) -> Run:
        """Return the run of `table_of` whose checkpoint a model's table is made of."""
        study = self.study
        choice, _ = choose(study, model.table_of, done)
        if len(study.learning_rates) == 1:
            return Run(model.table_of, choice.rate, study.seeds[0], FINAL)
        return tuning_run(study, model.table_of, choice.rate)

    def _options(self, name: str) -> dict[str, str]:
        """Return a model's options that are not fairseq-train's defaults, without those that change no result."""
        words = flags(self.composed(name).config)[1:]  # without the data
        pairs = [
            (word[2:].replace("-", "_"), "" if following.startswith("--") else following)
            for word, following in itertools.pairwise([*words, "--"])
            if word.startswith("--")
        ]
        return {key: value for key, value in sorted(pairs) if key not in OF_A_RUN}

    def request(self, run: Run, done: Done) -> Request:
        """Return what a worker needs to know of a run."""
        study, places, model = self.study, self.places, self.study.models[run.model]
        folder, of, config = self.folder(run, done), self.sizes(run.model), self.config(run, done)
        command = [sys.executable, "-m", "fairseq_cli.train", *flags(config)]
        return Request(
            folder=str(folder),
            command=command,
            record=str(self.record_path(run)),
            identity=self.identity(run, done),
            model=run.model,
            experiment=[model.experiment, *model.overrides, *places.overrides],
            learning_rate=run.learning_rate,
            seed=run.seed,
            parameters=of.total,
            active=of.active,
            experts=config.model.num_experts if of.expert_parameters > of.memory_parameters else 0,
            flops_per_token=of.training_flops / (of.tokens_per_update * of.updates),
            tokens_per_update=of.tokens_per_update,
            data=str(places.data),
            data_fingerprint=places.fingerprint,
            evaluations=study.evaluations(run.model) if run.stage == FINAL else {},
            threads=places.threads,
        )

    def _sizes(self, name: str) -> Sizes:
        return sizes(self.composed(name))

    def check(self, model: StudyModel) -> None:
        """Raise `UserError` if a model's trainings would not start, or its name says another number of experts."""
        experts = self.composed(model.name).config.model.num_experts
        if self.study.scaling and model.family is not None and model.family[1] != experts:
            raise UserError(
                f"{model.name} has {experts} experts; in a study of scaling the number at the end of a name is that of "
                "the experts: mend the name, or override model.num_experts"
            )
        if not model.table_of:
            check_experiment(self.composed(model.name), ranks=1)

    def done(self, records: Mapping[str, RunRecord]) -> Done:
        """Return the runs of the study that have records, however far it has come."""
        done: dict[Run, RunRecord] = {}
        while True:  # a tuned rate tells which final runs, and which tables of other models, are those of the study
            found = {}
            for run in wanted(self.study, done):
                record = records.get(self.identity(run, done))
                if record is not None and self._has_scores(run, record):
                    found[run] = record
            if not found:
                return done
            done |= found

    def check_records(self, records: Iterable[RunRecord], done: Done) -> None:
        """Raise `UserError` if one of the study's records is of other options or data than its run would be now."""
        for record in records:
            model = self.study.models.get(record.model)
            if model is None or model.trained_as:
                continue  # the study has changed, and the record is of no run of it
            if model.table_of and choose(self.study, model.table_of, done)[0].rate is None:
                continue
            run = Run(record.model, record.learning_rate, record.seed, FINAL)
            if self.identity(run, done) != record.identity:
                raise UserError(
                    f"{self.record_path(run)} is of another text or of other options than {run.model} has now; give "
                    "another --records, or delete such records, and their runs are made again"
                )

    def _has_scores(self, run: Run, record: RunRecord) -> bool:
        return run.stage != FINAL or bool(record.diverged) or set(self.study.evaluations(run.model)) <= set(record.test)

    def make_table(self, model: StudyModel, done: Done) -> "Run | None":
        """Make a model's hash table from the tuned run of `table_of`; return that run if it has to be made again.

        Raises:
            UserError: if the table cannot be made.
        """
        out = self.table_path(model, done)
        if out.is_file():
            return None
        source = self.source(model, done)
        checkpoint = self.folder(source, done) / "checkpoint_last.pt"
        if not checkpoint.is_file():
            return source
        out.parent.mkdir(parents=True, exist_ok=True)
        stand_for = {"checkpoint": str(checkpoint), "data": str(self.places.data), "out": str(out)}
        words = [word.format(**stand_for) for word in model.table]
        run_command(["tables", *words], f"the table of {model.name} cannot be made")
        if not out.is_file():
            raise UserError(
                f"the table of {model.name} cannot be made: its command writes elsewhere; give --out {{out}}"
            )
        return None


def tokens_per_update(experiment: Experiment) -> int:
    """Return the tokens of one update."""
    config = experiment.config
    batches = config.optimization.update_freq[0] * (config.criterion.get("update_freq_ranks", 0) or 1)
    return config.dataset.max_tokens * batches


def _rate_and_seed(run: Run) -> str:
    return f"lr{run.learning_rate:g}-seed{run.seed}"


def _quoted(path: "Path | str") -> str:
    """Return a path as a value in Hydra's grammar."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
