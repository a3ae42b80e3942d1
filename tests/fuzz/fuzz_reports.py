"""Readers of what runs and studies leave behind: logs, records, results of benchmarks, and definitions."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fuzz_formats import DEPTH, json_bytes, json_tree, log_tree, yaml_tree
from fuzz_mutations import Seed, Tree
from fuzz_rounds import Reader
from fuzz_seeds import ROOT, run_files
from made_runs import write_run
from made_study import made_facts, made_runs_of_study, made_study

from fairseq_hash.cli.texts import read_text
from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import compose
from fairseq_hash.reporting.benchmarks import split, times
from fairseq_hash.reporting.benchmarks_files import load_benchmarks
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.comparison_table import for_readers, layers_for_readers
from fairseq_hash.reporting.report import read_note
from fairseq_hash.studies.csv_tables import curves_csv, pairs_csv, results_csv, runs_csv
from fairseq_hash.studies.definition import load_study, quick
from fairseq_hash.studies.records import read_facts, read_records, write_record
from fairseq_hash.studies.results import gather
from fairseq_hash.studies.schedule import done_of, expected_runs, wanted
from fairseq_hash.training.expert_alarm import ExpertAlarm
from fairseq_hash.training.monitor_file import NAME as MONITOR
from fairseq_hash.training.monitor_file import MonitorFile

CONFIGS = ROOT / "configs"
EXPERIMENTS = ("laptop/hash", "laptop/topk_bias", "reddit/hash_1x64", "stablemoe/switch", "cc100_en/hash_4.5b")
STUDIES = ("main", "experts", "tables", "why", "first_k", "main_dialogue")
PUBLISHED = {"name": "made", "corpus": "a corpus", "vocabulary": 100, "published": {"valid": "23.16 A", "test": "1 S"}}


def log_seeds() -> list[Seed]:
    """Return folders of runs, of fairseq-train and of Hydra, with their evaluations and a record."""
    seeds: list[Seed] = []
    for name in ("dense", "hash", "switch"):
        texts = {path: content for path, content in run_files(name).items() if path.endswith(".log")}
        seeds.append({path: log_tree(content.decode()) for path, content in texts.items()})
        seeds.append(dict(texts))
    record = json_tree({"commands": {"train": ["fairseq-train"]}, "data_fingerprint": "f00d", "data": "words"})
    with tempfile.TemporaryDirectory() as folder:
        written = write_run(Path(folder) / "run", PUBLISHED, sessions=2, layers=[1])
        hydra = {path.name: log_tree(path.read_text()) for path in written.iterdir()}
    return [*seeds, {**hydra, "run.json": record}]


def log_hostile() -> list[Seed]:
    """Return runs whose record, and whose record of the model, are nested."""
    files = {path: content for path, content in run_files("hash").items() if path.endswith(".log")}
    return [{**files, "run.json": b"[" * DEPTH}, {**files, "run.json": b"[1]"}]


def read_logs(folder: Path) -> None:
    """Compare the runs of a folder, and make the tables of their report."""
    comparison = compare([folder], "A title")
    for_readers(comparison.of_models).to_csv()
    layers_for_readers(comparison.of_models).to_csv()
    comparison.of_runs.to_csv()


def benchmark_seeds() -> list[Seed]:
    """Return files of `--json` of a benchmark."""
    row = {"candidate": "hash", "experts": 16, "tokens": 4096, "seconds": 0.5, "low": 0.4, "high": 0.6, "ratio": 1.25}
    parts = {"route": 0.1, "experts": {"seconds": 0.3, "low": 0.2, "high": 0.4}}
    rows = [row, {**row, "candidate": "hash decoding", "peak_bytes": 1000, "parts": parts, "held_bytes": 5}]
    made = {"benchmark": "layer", "settings": {"threads": 1, "widths": [1, 2]}, "left_out": ["x: no memory"]}
    made |= {"rows": rows, "provenance": {"date": "2026-01-02", "gpus": [], "cores": 2}}
    return [{"layer.json": json_tree(made)}, {"layer.json": json_tree({**made, "benchmark": "train"})}]


def read_benchmarks(folder: Path) -> None:
    """Load a file and make the tables of its report."""
    for benchmark in load_benchmarks([folder / "layer.json"]):
        times(benchmark)
        split(benchmark)


@functools.cache
def _records() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for number, record in enumerate(made_runs_of_study().values()):
            write_record(Path(folder) / f"{number:02}.json", record)
        write_record(Path(folder) / "text.json", made_facts())
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def record_seeds() -> list[Seed]:
    """Return the records of a study: one of them, and the facts of its text."""
    names = ("00.json", "05.json", "10.json", "12.json", "text.json")
    trees = {name: json_tree(json.loads(_records()[name])) for name in names}
    return [{name: tree} for name, tree in trees.items()] + [{"10.json": _records()["10.json"]}]


def record_hostile() -> list[Seed]:
    """Return records that are no objects, and nested ones."""
    return [{"10.json": content} for content in (b"[" * DEPTH, b"[]", b"null", b'"x"', b"{}")]


@functools.cache
def _made() -> dict:
    return made_runs_of_study()


def read_study_records(folder: Path) -> None:
    """Read records, and put them in the place of a study's own when its tables are made."""
    facts = made_facts()
    if (folder / "text.json").is_file():
        facts = read_facts(folder / "text.json")
        (folder / "text.json").unlink()
    study, done = made_study(), dict(_made())
    done |= done_of(study, read_records(folder).values())
    results = gather(study, facts, done)
    wanted(study, done)
    results_csv(results, {})
    runs_csv(results)
    curves_csv(results)
    pairs_csv(results)


def study_seeds() -> list[Seed]:
    """Return definitions of studies; one extends another."""
    texts = {name: (CONFIGS / "studies" / f"{name}.yaml").read_text() for name in STUDIES}
    alone = [{"s.yaml": yaml_tree(text)} for name, text in texts.items() if name != "main_dialogue"]
    extended: Seed = {"s.yaml": yaml_tree(texts["main_dialogue"]), "main.yaml": yaml_tree(texts["main"])}
    return [*alone, extended, {"s.yaml": texts["main"].encode()}, {"s.yaml": texts["tables"].encode()}]


def study_hostile() -> list[Seed]:
    """Return definitions that name code, refer to themselves, and are nested or grow when they are read."""
    command = b"title: !!python/object/apply:os.system ['true']\n"
    grows = b"a: &a [x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(9)
    )
    nested = b"title: " + b"[" * DEPTH
    return [{"s.yaml": content} for content in (command, grows, nested, b"extends: s\n", b"title: ${title}\n", b"[]\n")]


def read_study(folder: Path) -> None:
    """Load a study, and plan its runs."""
    study = load_study(folder / "s.yaml")
    quick(study)
    expected_runs(study)
    wanted(study, {})
    for model in study.trained():
        study.evaluations(model.name)
        model.family  # noqa: B018


def config_seeds() -> list[Seed]:
    """Return experiments: their own file, and one of those that they share."""
    seeds: list[Seed] = []
    for name in EXPERIMENTS:
        group, _, _ = name.partition("/")
        texts = {
            f"fuzz/{one.name}": one.read_text() for one in (CONFIGS / f"{name}.yaml", CONFIGS / group / "_shared.yaml")
        }
        own = f"fuzz/{Path(name).name}.yaml"
        texts["fuzz/x.yaml"] = texts.pop(own).replace(f"/{group}/", "/fuzz/")
        seeds.append({path: yaml_tree(text) for path, text in texts.items()})
        seeds.append({path: text.encode() for path, text in texts.items()})
    return seeds


def config_hostile() -> list[Seed]:
    """Return experiments that name code, refer to themselves, or are nested."""
    shared = (CONFIGS / "laptop" / "_shared.yaml").read_bytes()
    head = b"# @package _global_\n"
    files = (
        head + b"x: !!python/object/apply:os.system ['true']\n",
        head + b"defaults: [/fuzz/x]\n",
        head + b"defaults: [/fuzz/_shared]\nmodel: {num_experts: '${model.num_experts}'}\n",
        head + b"defaults: " + b"[" * DEPTH,
    )
    return [{"fuzz/_shared.yaml": shared, "fuzz/x.yaml": content} for content in files]


def read_config(folder: Path) -> None:
    """Compose an experiment beside the project's own groups."""
    for path in CONFIGS.iterdir():
        os.symlink(path, folder / path.name)
    compose(folder, "fuzz/x")


def text_seeds() -> list[Seed]:
    """Return texts for `--note` and for `fairseq-hash experts`."""
    return [{"note": b"A first paragraph,\nof < 3 lines.\n\nA second one.\n"}, {"note": "naïve café\u2028\n".encode()}]


def read_texts(folder: Path) -> None:
    """Read a text as the note of a report and as a text whose experts are asked for."""
    read_note(folder / "note")
    read_text(str(folder / "note"))


def monitor_seeds() -> list[Seed]:
    """Return the monitor's file, as bytes and line by line."""
    line = {"update": 2, "layer": 1, "router": "switch", "updates": 1, "dropped": 0.25, "load": [0.5, 0.5, 0.0]}

    def dump(lines: Any) -> bytes:
        return b"".join(json_bytes(one) + b"\n" for one in (lines if isinstance(lines, list) else [lines]))

    lines = [{**line, "update": update} for update in (1, 2, 3)]
    return [{MONITOR: dump(lines)}, {MONITOR: Tree(lines, dump)}]


def read_monitor(folder: Path) -> None:
    """Go on in the monitor's file, as a training that resumes. It refuses no file: a damaged line goes."""
    alarm, lines = ExpertAlarm(2, 1.1), (folder / MONITOR).read_bytes().splitlines()
    records = MonitorFile(folder).resume(10**9)
    for record in records:
        alarm.hear(record)
    if len(records) < len(lines):
        raise UserError("a line went")


READERS = (
    Reader("training log", log_seeds, read_logs, log_hostile, share=0.2),
    Reader("result of a benchmark", benchmark_seeds, read_benchmarks, lambda: [{"layer.json": b"[" * DEPTH}]),
    Reader("record of a study", record_seeds, read_study_records, record_hostile),
    Reader("definition of a study", study_seeds, read_study, study_hostile, share=0.3),
    Reader("configuration", config_seeds, read_config, config_hostile, share=0.02),
    Reader("monitor's file", monitor_seeds, read_monitor, lambda: [{MONITOR: b"[" * DEPTH}, {MONITOR: b"1\n"}]),
    Reader("note and text", text_seeds, read_texts, lambda: [{"note": b"\xff"}]),
)
