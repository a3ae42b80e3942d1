"""What fuzzing has found in readers of logs, records and studies.

Each input is the smallest that showed a traceback, or took too long or too much memory. Now it ends in one line.
"""

import itertools
import json
import math

import pandas as pd
import pytest
from fuzz_found import DEEP, refused, written
from fuzz_reports import read_logs, read_study, read_study_records
from made_runs import write_run

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.benchmarks_files import load_benchmarks
from fairseq_hash.reporting.comparison_table import _mean, for_readers
from fairseq_hash.studies.definition import load_study


def log_with(folder, old, new):
    path = write_run(folder / "run") / "rank0.log"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder / "run"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'seed': 1", "'seed': [1]"),
        ("'seed': 1", "'sead': 1"),
        ("'update_freq': [1]", "'update_freq': 'x'"),
        ('"router": "hash"', '"router": 5'),
        ('"parameters_total": 500, ', ""),
        ('"wps": "100"', '"wps": [1, "x"]'),
        ('"ups": "2", ', ""),
        ('"valid_ppl": ', '"valid_x": '),
    ],
)
def test_a_log_that_says_something_of_another_kind(tmp_path, old, new):
    message = refused(read_logs, log_with(tmp_path, old, new))
    assert f"{tmp_path / 'run'}: " in message and ("its " in message)


@pytest.mark.parametrize("value", [DEEP, "(" * 300 + ")" * 300, "[1]: 2", "**x"])
def test_a_configuration_in_a_log_that_python_cannot_parse(tmp_path, value):
    """Python's parser raises MemoryError and RecursionError for brackets within each other."""
    folder = log_with(tmp_path, "'seed': 1", f"'seed': {value}")
    assert "cannot read a configuration" in refused(read_logs, folder) or "seed" in refused(read_logs, folder)


@pytest.mark.parametrize("line", ["[1]", DEEP])
def test_a_line_of_statistics_that_is_no_object_counts_as_cut_off(tmp_path, line):
    folder = write_run(tmp_path / "run")
    with (folder / "rank0.log").open("a") as log:
        log.write(f"[2026-01-02 03:59:59,123][train_inner][INFO] - {line}\n")
    read_logs(folder)


@pytest.mark.parametrize("result", ["79.8.80", "1e", "x"])
def test_an_evaluation_whose_result_is_no_number(tmp_path, result):
    folder = write_run(tmp_path / "run")
    path = folder / "eval-valid.log"
    path.write_text(path.read_text().replace("Perplexity: 20", f"Perplexity: {result}"))
    try:
        read_logs(folder)
    except UserError as error:
        assert result in str(error)


@pytest.mark.parametrize("content", ["[1]", DEEP, '{"commands": {"train": "x"}}', '{"commands": 1}'])
def test_a_run_whose_record_is_no_object(tmp_path, content):
    written(write_run(tmp_path / "run") / "run.json", content)
    assert "run.json" in refused(read_logs, tmp_path / "run")


@pytest.mark.parametrize(
    "content", [DEEP, '{"benchmark": "layer", "rows": [{}], "left_out": 0.5}', '{"benchmark": ["layer"]}']
)
def test_a_result_of_a_benchmark_that_is_nested_or_has_other_kinds(tmp_path, content):
    assert "layer.json" in refused(load_benchmarks, [written(tmp_path / "layer.json", content)])


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("seed", [1]),
        ("learning_rate", "x"),
        ("validations", []),
        ("tokens", float("nan")),
        ("test", {"a": {}}),
        ("provenance", {"commit": "\ud800"}),  # half of a character
    ],
)
def test_a_record_of_a_study_with_another_kind_of_value(tmp_path, entry, value):
    from fuzz_reports import _records

    content = {**json.loads(_records()["10.json"]), entry: value}
    written(tmp_path / "10.json", json.dumps(content))
    assert "10.json is no record of a study" in refused(read_study_records, tmp_path)


GROWS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)
MAIN = (
    "title: a\nquestion: a\nlimits: a\nbaseline: A\nlearning_rates: [0.1]\nseeds: [1]\n"
    "text: {name: a, pieces: 300, train_tokens: 9, valid_tokens: 9, test_tokens: 9}\nmodels: {A: {experiment: a}}\n"
)


@pytest.mark.parametrize(
    "content",
    [
        MAIN.replace("{A: {experiment: a}}", "{A: 5}"),
        MAIN.replace("text: {", "text: [{").replace("9}", "9}]"),
        MAIN.replace("seeds: [1]", "seeds: [{a: 1}]"),
        MAIN.replace("seeds: [1]", "seeds: 1"),
        MAIN.replace("baseline: A", "baseline: {A: 1}"),
        MAIN + "grow: x\n",
        MAIN + "comparisons: [[A, {}]]\n",
        MAIN + "extends: [a]\n",
        MAIN + "extends: ../s\n",
        MAIN + "extends: s\n",
        MAIN.replace("title: a", "title: ${title}"),
        "[1]\n",
        "a: " + "[" * 20_000,
        GROWS,
        "title: !!python/object/apply:os.system ['true']\n",
    ],
)
def test_a_definition_of_a_study_with_another_kind_of_value(tmp_path, content):
    load_study(written(tmp_path / "whole.yaml", MAIN))
    written(tmp_path / "s.yaml", content)
    assert "s.yaml" in refused(read_study, tmp_path)


def test_a_report_of_logs_that_lack_what_it_shows():
    """A statistic without values, and a table without a column: both were tracebacks of the report."""
    row = {"model": "a", "runs": 1, "parameters_total": 1, "parameters_active": 1, "wall_seconds": 1.0}
    lacking = ("load_max_train", "load_max_valid", "dropped")
    models = pd.DataFrame([row | dict.fromkeys(lacking, float("nan"))])
    assert list(for_readers(models)["Updates"]) == ["–"]
    assert math.isnan(_mean([{"other": 1.0}], "load_max"))
