"""Runs a study: text, trainings, records, report. What has a record is done; everything else is found anew."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import only_one
from fairseq_hash.core.progress import Display
from fairseq_hash.experiments.ngrams import LONGEST, orders_that_fit
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import usable_cores
from fairseq_hash.studies.definition import Study
from fairseq_hash.studies.pool import Jobs, Pool, Processes, Work, why_failed
from fairseq_hash.studies.progress import StudyProgress
from fairseq_hash.studies.records import RunRecord, TextFacts, read_facts, read_records, write_record
from fairseq_hash.studies.requests import Places, Requests
from fairseq_hash.studies.schedule import Done, Run, wanted
from fairseq_hash.studies.text import WORK, facts_of, fingerprint_of, given_text, prepare_text
from fairseq_hash.studies.worker import write_request

LOOK_SECONDS = 0.5  # between two looks at the workers
SPECIAL = 4  # symbols that fairseq adds to every dictionary


@dataclass(frozen=True)
class Setting:
    """Where and how a study runs.

    Attributes:
        configs: folder of the configurations.
        text: folder of train.txt, valid.txt and test.txt; None for the embedded text.
        data: the study's binarized data, if they were made before; else they are made of the text.
        work: folder of data and run folders, shared by studies.
        records: folder of this study's records and report. Studies beside it lend theirs.
        jobs: how many trainings at once.
        slurm: submitit's options of a job; None for processes of this machine.
        overrides: of every model's configuration.
    """

    configs: Path
    text: "Path | None"
    data: "Path | None"
    work: Path
    records: Path
    jobs: int
    slurm: "Mapping[str, Any] | None" = None
    overrides: tuple[str, ...] = ()


@dataclass
class State:
    """How far a study is."""

    facts: TextFacts
    requests: Requests
    done: Done = field(default_factory=dict)
    lent: "dict[str, RunRecord] | None" = None  # records of other studies by identity; read once

    def read(self, records: Path) -> None:
        """Take the records that are there now. Another study's is copied if its run would be the same."""
        own = records / "runs"
        known = read_records(own)
        if self.lent is None:
            others = (read_records(path) for path in sorted(records.parent.glob("*/runs")) if path != own)
            self.lent = {identity: record for of_study in others for identity, record in of_study.items()}
        self.done = self.requests.done({**self.lent, **known})
        for run, record in self.done.items():
            if record.identity not in known:
                write_record(self.requests.record_path(run), replace(record, model=run.model))


def open_study(study: Study, setting: Setting, display_of: Callable[[float], Display] = Display) -> State:
    """Prepare a study's text and find what is done.

    Raises:
        UserError: if the text cannot be prepared, a model could not be trained, or the records are of other runs.
    """
    with display_of(2 * WORK + LONGEST) as display:
        if setting.data is None:
            data = prepare_text(study.text, setting.text, setting.work / "data", display)
        else:
            data = given_text(study.text, setting.data)
        symbols, _ = read_dictionary(data / "dict.txt")
        # A SLURM job has the cores that it was given, which are not those of the machine that submits it.
        threads = max(1, usable_cores() // setting.jobs) if setting.slurm is None else None
        places = Places(
            configs=setting.configs,
            data=data.absolute(),
            fingerprint=fingerprint_of(data),
            vocabulary=len(symbols) - SPECIAL,
            runs=(setting.work / study.name / "runs").absolute(),
            records=(setting.records / "runs").absolute(),
            overrides=setting.overrides,
            threads=threads,
        )
        requests = Requests(study, places)
        for model in study.trained():
            requests.check(model)
        own = read_records(places.records)
        requests.check_records(own.values(), requests.done(own))
        baseline = study.models[study.models[study.baseline].trained_as or study.baseline]
        sample = requests.composed(baseline.name).config.task.tokens_per_sample
        path = setting.records / "text.json"
        facts = read_facts(path) if path.is_file() else None
        needed = {str(order) for order in orders_that_fit(len(symbols))}
        known = facts is not None and (facts.fingerprint, facts.tokens_per_sample) == (places.fingerprint, sample)
        if not known or facts.ngrams["test"].keys() != needed:
            facts = facts_of(study.text, data, sample, display)
            write_record(path, facts)
    state = State(facts, requests)
    state.read(setting.records)
    return state


def run_study(study: Study, setting: Setting, state: State, progress: StudyProgress) -> None:
    """Make the runs that a study lacks, at most `setting.jobs` at once.

    Raises:
        UserError: if a worker fails, after the others have ended.
        KeyboardInterrupt: if it was interrupted, when the workers have ended.
    """
    folder = setting.work / study.name
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"study {study.name} is running in {setting.work}; wait for its end, or give another --work"
    with only_one(folder, taken):
        pool: Pool = Processes() if setting.slurm is None else Jobs(folder / "slurm", setting.slurm)
        _run(study, setting, state, pool, progress)


def _run(study: Study, setting: Setting, state: State, pool: Pool, progress: StudyProgress) -> None:
    working: dict[Run, tuple[Path, Work]] = {}
    failures: list[str] = []
    try:
        while True:
            for run in [run for run, (_, work) in working.items() if work.is_done()]:
                request, work = working.pop(run)
                state.read(setting.records)
                if run in state.done:
                    progress.ended(run, state.done[run])
                else:
                    failures.append(why_failed(request, work.log))
                    progress.failed(run, failures[-1])
            if not failures:
                for run in _startable(study, state, working)[: setting.jobs - len(working)]:
                    request = write_request(state.requests.request(run, state.done))
                    working[run] = request, pool.start(request)
                    progress.began(run, request.parent)
            if not working:
                break
            progress.look(state.done)
            time.sleep(LOOK_SECONDS)
    finally:
        for _, work in working.values():
            work.stop()
        for _, work in working.values():
            work.wait()
    if failures:
        raise UserError(failures[0])


def _startable(study: Study, state: State, working: "Mapping[Run, Any]") -> list[Run]:
    """Return the runs that can start now: wanted, not at work, and with their hash table made."""
    runs: list[Run] = []
    waits: set[str] = set()
    for run in wanted(study, state.done):
        model = study.models[run.model]
        if run in working or run.model in waits:
            continue
        if model.table_of:
            source = state.requests.make_table(model, state.done)
            if source is not None:  # its record is there, its checkpoint is not
                waits.add(run.model)
                if source not in working and source not in runs:
                    runs.append(source)
                continue
        runs.append(run)
    return runs
