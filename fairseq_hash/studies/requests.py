"""From a run of a study to the request that a worker takes: its composed configuration, command and identity."""

import functools
import itertools
import subprocess
import sys
from collections.abc import Mapping
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
from fairseq_hash.studies.definition import Study, StudyModel, folder_name
from fairseq_hash.studies.records import FINAL, RunRecord, identity_of
from fairseq_hash.studies.schedule import Done, Run, choose, tuning_run
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
        threads: of one training.
    """

    configs: Path
    data: Path
    fingerprint: str
    vocabulary: int
    runs: Path
    records: Path
    overrides: tuple[str, ...]
    threads: int


class Requests:
    """Makes requests of a study's runs. Composing a configuration takes some tenths of a second, so they are kept."""

    def __init__(self, study: Study, places: Places) -> None:
        self.study, self.places = study, places
        self.composed = functools.cache(self._composed)
        self.sizes = functools.cache(self._sizes)
        self.options = functools.cache(self._options)
        self.identity = functools.cache(self._identity)

    def _composed(self, name: str) -> Experiment:
        return self._compose(name, self.study.learning_rates[0], self.study.tuning_seed)

    def _compose(self, name: str, rate: float, seed: int) -> Experiment:
        """Return a model's configuration. Rate and seed are composed with it: other groups refer to them."""
        model = self.study.models[name]
        text, places = self.study.text, self.places
        words = [*model.overrides, *places.overrides, f"task.data={_quoted(places.data)}"]
        words += [f"experiment.vocabulary={places.vocabulary}", f"optimization.lr=[{rate!r}]", f"common.seed={seed}"]
        if model.table_of:
            words.append(f"model.hash_table={_quoted(self.table_path(model))}")
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

    def table_path(self, model: StudyModel) -> Path:
        """Return where a model's made table lies."""
        return self.places.runs / folder_name(model.name) / "table.safetensors"

    def folder(self, run: Run) -> Path:
        """Return a run's folder."""
        return self.places.runs / folder_name(run.model) / f"lr{run.learning_rate:g}-seed{run.seed}"

    def record_path(self, run: Run) -> Path:
        """Return the file of a run's record."""
        return self.places.records / f"{folder_name(run.model)}-{self.folder(run).name}.json"

    def config(self, run: Run) -> DictConfig:
        """Return a run's configuration."""
        config = self._compose(run.model, run.learning_rate, run.seed).config
        config.checkpoint.save_dir = str(self.folder(run))
        return config

    def _identity(self, run: Run) -> str:
        """Return what tells a run from others.

        Options with their defaults are no part of it, so that a version with more options still knows its records.
        """
        model = self.study.models[run.model]
        options = self.options(run.model)
        made_table: list[str] = []
        if model.table_of:
            options = {key: value for key, value in options.items() if key != "hash_table"}  # a path
            source = self.study.models[model.table_of]
            made_table = [source.experiment, *source.overrides, *model.table]
        known = {"options": options, "table": made_table, "data": self.places.fingerprint}
        return identity_of({**known, "seed": run.seed, "learning_rate": run.learning_rate})

    def _options(self, name: str) -> dict[str, str]:
        """Return a model's options that are not fairseq-train's defaults, without those that change no result."""
        words = flags(self.composed(name).config)[1:]  # without the data
        pairs = [
            (word[2:].replace("-", "_"), "" if following.startswith("--") else following)
            for word, following in itertools.pairwise([*words, "--"])
            if word.startswith("--")
        ]
        return {key: value for key, value in sorted(pairs) if key not in OF_A_RUN}

    def request(self, run: Run) -> Request:
        """Return what a worker needs to know of a run."""
        study, places, model = self.study, self.places, self.study.models[run.model]
        folder, of, config = self.folder(run), self.sizes(run.model), self.config(run)
        command = [sys.executable, "-m", "fairseq_cli.train", *flags(config)]
        return Request(
            folder=str(folder),
            command=command,
            record=str(self.record_path(run)),
            identity=self.identity(run),
            model=run.model,
            experiment=[model.experiment, *model.overrides, *places.overrides],
            learning_rate=run.learning_rate,
            seed=run.seed,
            parameters=of.total,
            active=of.active,
            experts=config.model.num_experts if of.expert_parameters else 0,
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
        """Raise `UserError` if a model's trainings would not start."""
        if not model.table_of:
            check_experiment(self.composed(model.name), ranks=1)

    def done(self, records: Mapping[str, RunRecord]) -> Done:
        """Return the runs of the study that have records, however far it has come."""
        done: dict[Run, RunRecord] = {}
        for model in self.study.trained():
            while True:
                choice, needed = choose(self.study, model.name, done)
                if choice.is_settled and choice.rate is not None:
                    needed = [Run(model.name, choice.rate, seed, FINAL) for seed in self.study.seeds]
                found = {}
                for run in needed:
                    record = records.get(self.identity(run))
                    if record is not None and run not in done and self._has_scores(run, record):
                        found[run] = record
                done |= found
                if not found or choice.is_settled:
                    break
        return done

    def _has_scores(self, run: Run, record: RunRecord) -> bool:
        return run.stage != FINAL or bool(record.diverged) or set(self.study.evaluations(run.model)) <= set(record.test)

    def make_table(self, model: StudyModel, done: Done) -> "Run | None":
        """Make a model's hash table from the tuned run of `table_of`; return that run if it has to be made again.

        Raises:
            UserError: if the table cannot be made.
        """
        out = self.table_path(model)
        if out.is_file():
            return None
        choice, _ = choose(self.study, model.table_of, done)
        source = tuning_run(self.study, model.table_of, choice.rate)
        if len(self.study.learning_rates) == 1:
            source = Run(model.table_of, choice.rate, self.study.seeds[0], FINAL)
        checkpoint = self.folder(source) / "checkpoint_last.pt"
        if not checkpoint.is_file():
            return source
        out.parent.mkdir(parents=True, exist_ok=True)
        stand_for = {"checkpoint": str(checkpoint), "data": str(self.places.data), "out": str(out)}
        words = [word.format(**stand_for) for word in model.table]
        main = "import sys; from fairseq_hash.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", main, "tables", *words]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode or not out.is_file():
            raise UserError(f"the table of {model.name} cannot be made: {_last_line(made.stderr)}")
        return None


def tokens_per_update(experiment: Experiment) -> int:
    """Return the tokens of one update."""
    config = experiment.config
    batches = config.optimization.update_freq[0] * (config.criterion.get("update_freq_ranks", 0) or 1)
    return config.dataset.max_tokens * batches


def _quoted(path: Path) -> str:
    """Return a path as a value in Hydra's grammar."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _last_line(text: str) -> str:
    return (text.strip() or "no reason given").splitlines()[-1]
