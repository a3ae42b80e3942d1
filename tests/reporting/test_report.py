"""The report on real runs: its numbers against plain Python on the logs, in all its files; what it refuses."""

import csv
import json
import re
import statistics

import pytest
from made_runs import NAMES, edit, markdown_table, model_record, perplexity, raw

from fairseq_hash.cli import main
from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.report import write_report

pytestmark = pytest.mark.usefixtures("unrendered")


def strict_json(path):
    """Read JSON as browsers do: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def results(reported):
    return strict_json(reported / "results.json")


def by_model(results):
    return {row["model"]: row for row in results["models"]}


def by_run(results):
    return {row["folder"].rpartition("/")[2]: row for row in results["runs"]}


def test_perplexities_are_those_that_eval_lm_printed(made, results):
    """One by one, and over the dense model's two seeds as mean and sample standard deviation."""
    assert list(by_run(results)) == list(NAMES)
    runs = [("Dense", 5), ("Dense", 6), ("Hash", 5), ("Switch", 5)]
    assert [(row["model"], row["seed"]) for row in results["runs"]] == runs
    models = by_model(results)
    assert {name: row["runs"] for name, row in models.items()} == {"Dense": 2, "Hash": 1, "Switch": 1}
    for subset in ("valid", "test"):
        printed = {name: perplexity(made / name, subset) for name in NAMES}
        assert {name: row[f"{subset}_perplexity"] for name, row in by_run(results).items()} == printed
        dense = [printed["dense5"], printed["dense6"]]
        assert models["Dense"][f"{subset}_perplexity"] == pytest.approx(statistics.fmean(dense), rel=1e-12)
        assert models["Dense"][f"{subset}_perplexity_sd"] == pytest.approx(statistics.stdev(dense), rel=1e-12)
        for name in ("Hash", "Switch"):
            assert models[name][f"{subset}_perplexity"] == printed[f"{name.lower()}5"]
            assert models[name][f"{subset}_perplexity_sd"] is None


def test_parameters_by_arithmetic(results):
    """Tied embeddings of 64 tokens, D 16, F 32, 2 layers; layer 1 has 4 experts, the switch router D x 4 weights."""
    d, f, experts = 16, 32, 4
    attention, norm, feed_forward = 4 * (d * d + d), 2 * d, (d * f + f) + (f * d + d)
    dense = 64 * d + 2 * (attention + 2 * norm + feed_forward) + norm
    total = {"Dense": dense, "Hash": dense + 3 * feed_forward, "Switch": dense + 3 * feed_forward + d * experts}
    active = {"Dense": dense, "Hash": dense, "Switch": dense + d * experts}
    for name, row in by_model(results).items():
        assert (row["parameters_total"], row["parameters_active"]) == (total[name], active[name])
        assert row["experts"] == (1 if name == "Dense" else experts)


def test_speed_and_loads_by_plain_python(made, results):
    """Of 8 log intervals a tenth, rounded to one, is left out. 1e-9: sums in another order."""
    for name, row in by_run(results).items():
        last = {int(record["num_updates"]): record for record in raw(made / name, "train_inner")}
        settled = [last[update] for update in range(2, 9)]
        assert row["tokens_per_second"] == pytest.approx(statistics.median(float(r["wps"]) for r in settled), rel=1e-9)
        assert row["updates"] == 8
        if name == "dense6":  # resumed at update 4, where fairseq's clock starts to stand still
            assert row["wall_seconds"] >= float(raw(made / name, "train_inner")[3]["wall"])
        else:
            assert row["wall_seconds"] == float(raw(made / name, "train")[-1]["train_wall"])
        if name.startswith("dense"):
            assert row["load_max_train"] is None and row["load_max_valid"] is None and row["dropped"] is None
            continue
        mean = {key: statistics.fmean(float(r[f"layer1_{key}"]) for r in settled) for key in ("load_max", "dropped")}
        assert row["load_max_train"] == row["layer1_load_max_train"] == pytest.approx(mean["load_max"], rel=1e-9)
        assert row["dropped"] == pytest.approx(mean["dropped"], rel=1e-9)
        assert row["load_max_valid"] == float(raw(made / name, "valid")[-1]["valid_layer1_load_max"])
    assert by_run(results)["switch5"]["dropped"] > 0


def test_all_files_say_the_same(reported, results):
    """The CSVs have the JSON's models and runs; the Markdown shows the JSON's models, rounded."""
    for name, records in (("results.csv", results["models"]), ("runs.csv", results["runs"])):
        with (reported / name).open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(records)
        for row, record in zip(rows, records, strict=True):
            assert row.keys() == record.keys()
            for key, value in record.items():
                same = row[key] == "" if value is None else row[key] == value or float(row[key]) == pytest.approx(value)
                assert same, (key, row[key], value)
    shown = markdown_table((reported / "results.md").read_text())
    for name, row in by_model(results).items():
        cells = shown[name]
        for subset in ("Valid", "Test"):
            value, sd = row[f"{subset.lower()}_perplexity"], row[f"{subset.lower()}_perplexity_sd"]
            assert cells[f"{subset} perplexity"] == f"{value:.2f}" + (f" ± {sd:.2f}" if sd else "")
        assert cells["Seeds"] == str(row["runs"]) and cells["Updates"] == "8" and cells["Parameters"] == "0.01 M"
        assert cells["Tokens/s"] == f"{row['tokens_per_second']:,.0f}"
        dense = row["load_max_train"] is None
        assert cells["Max load, training"] == ("–" if dense else f"{row['load_max_train']:.2f}")
        assert cells["Max load, validation"] == ("–" if dense else f"{row['load_max_valid']:.2f}")
        assert cells["Dropped"] == ("–" if dense else f"{100 * row['dropped']:.1f}%")


def test_the_raw_numbers_are_kept(made, results):
    """Every run's configuration, record and log, to draw other figures from."""
    assert list(results["raw"]) == [str(made / name) for name in NAMES]
    for name in NAMES:
        content = results["raw"][str(made / name)]
        assert content["model"] == model_record(made / name)
        assert content["config"]["common.seed"] == int(name[-1])
        last = {int(record["num_updates"]): float(record["loss"]) for record in raw(made / name, "train_inner")}
        assert {values["num_updates"]: values["loss"] for values in content["intervals"]} == last
        assert [values["num_updates"] for values in content["validations"]] == [2, 4, 6, 8]
        assert content["evaluations"]["test"]["perplexity"] == perplexity(made / name, "test")
    assert results["report"]["fairseq_hash"] and results["title"] == "Runs & <b>more</b>"


@pytest.mark.parametrize("names", [["dense5", "dense6"], ["hydra"]])
def test_dense_models_alone(made, tmp_path, names):
    """No loads to show: neither columns nor a figure. A run that was not evaluated shows its best validation."""
    paths = write_report([made / name for name in names], tmp_path, "T")
    assert "expert_loads.png" not in [path.name for path in paths]
    (row,) = strict_json(tmp_path / "results.json")["models"]
    expected = [perplexity(made / name, "valid") for name in names] if names != ["hydra"] else None
    expected = expected or [min(float(record["valid_ppl"]) for record in raw(made / "hydra", "valid"))]
    assert row["valid_perplexity"] == pytest.approx(statistics.fmean(expected))
    (cells,) = markdown_table((tmp_path / "results.md").read_text()).values()
    assert cells["Valid perplexity"].endswith(" (training)") == (names == ["hydra"])
    assert not any("load" in heading or heading == "Dropped" for heading in cells)


def test_without_validation_in_training(copies, tmp_path):
    """Evaluated all the same; no load of a validation is known."""
    log = copies / "switch5" / "train.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "| valid |" not in line))
    write_report([copies / "switch5"], tmp_path, "T")
    (row,) = strict_json(tmp_path / "results.json")["models"]
    assert row["load_max_valid"] is None and row["load_max_train"] > 1
    (cells,) = markdown_table((tmp_path / "results.md").read_text()).values()
    assert cells["Max load, validation"] == "–" and cells["Max load, training"] != "–"


def test_what_readme_tells_to_type(copies, tmp_path, capsys):
    """One run evaluated on test, another one not at all, one with an evaluation of nothing: none of them is lost."""
    for name in ("hash5", "switch5", "dense5"):
        (copies / name / "eval-valid.log").unlink()
    (copies / "switch5" / "eval-test.log").unlink()
    log = copies / "dense5" / "eval-test.log"
    nothing = re.sub("Evaluated [0-9,]+", "Evaluated 0", log.read_text())
    log.write_text(re.sub("Perplexity: .*", "Perplexity: 1.00", nothing))
    edit(copies / "dense6" / "train.log", "done training", "going on")
    folders = [str(copies / name) for name in NAMES]
    main(["report", *folders, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    first, *left_out = said.err.splitlines()
    assert first == "compared 3 runs of 3 models, left out 2"
    assert re.match(f"left out: {re.escape(folders[1])}: its training .* at update 8 of 8", left_out[0])
    fault = "it scored no token; repeat it with --tokens-per-sample 16"
    assert left_out[1] == f"left out: {folders[0]}, evaluation on test: {fault}"
    assert len(left_out) == 2 and "wrote" in said.out and "wrote" not in said.err
    shown = markdown_table((tmp_path / "out" / "results.md").read_text())
    assert list(shown) == ["Dense", "Hash", "Switch"]
    for name, cells in shown.items():
        best = min(float(record["valid_ppl"]) for record in raw(copies / f"{name.lower()}5", "valid"))
        assert cells["Valid perplexity"] == f"{best:.2f} (training)"
    evaluated = f"{perplexity(copies / 'hash5', 'test'):.2f}"
    assert [cells["Test perplexity"] for cells in shown.values()] == ["–", evaluated, "–"]
    results = strict_json(tmp_path / "out" / "results.json")
    assert [row["valid_from"] for row in results["runs"]] == ["training"] * 3
    assert [f"left out: {what}: {why}" for what, why in results["left_out"].items()] == left_out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "it scored no token" in page


@pytest.mark.parametrize("how", ["steps", "samples"])
def test_validations_of_a_part_are_no_result(copies, tmp_path, how, capsys):
    folder = copies / "hydra"
    for log in folder.glob("*.log"):
        if how == "steps":
            edit(log, "'max_valid_steps': None", "'max_valid_steps': 3")
        else:
            line = next(line for line in log.read_text().splitlines() if "training on" in line)
            said = (
                "3 of 9 samples of valid, with 70 of 90 tokens, are longer than 8 tokens (the positions) and left out"
            )
            edit(log, line, f"{line.partition('][')[0]}][fairseq_hash.seams.lengths][WARNING] - {said}\n{line}")
    main(["report", str(folder), str(copies / "hash5"), "--out", str(tmp_path / "out")])
    _, left_out = capsys.readouterr().err.splitlines()
    assert left_out.startswith(f"left out: {folder}, validation in training: it ")
    rows = {row["folder"]: row for row in strict_json(tmp_path / "out" / "results.json")["runs"]}
    assert rows[str(folder)]["valid_perplexity"] is None and rows[str(copies / "hash5")]["valid_perplexity"] > 1


def test_numbers_that_are_not_finite_are_json(copies, tmp_path):
    log = copies / "switch5" / "train.log"
    log.write_text(re.sub(r'"valid_ppl": "[^"]*"', '"valid_ppl": "inf"', log.read_text(), count=1))
    write_report([copies / "switch5"], tmp_path, "T")
    (content,) = strict_json(tmp_path / "results.json")["raw"].values()
    assert next(values["ppl"] for values in content["validations"]) == "inf"


def test_a_second_report_replaces_the_first(made, tmp_path):
    write_report([made / "dense5"], tmp_path, "First")
    write_report([made / "dense5"], tmp_path, "Second")
    assert strict_json(tmp_path / "results.json")["title"] == "Second"
    assert not list(tmp_path.glob(".*"))


def test_refusals_write_nothing(made, copies, tmp_path):
    edit(copies / "dense5" / "eval-test.log", "Perplexity:", "Perplexity: nan")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "file").touch()
    unread = r"\(.*\); give a text file in UTF-8"
    for runs, out, note, message in (
        ([copies / "dense5"], "out", None, r"no run can be reported; \S+/dense5: its perplexity on test is nan$"),
        ([made / "dense5"], "out", tmp_path / "none", rf"cannot read --note \S+/none {unread}"),
        ([made / "dense5"], "out", tmp_path / "latin", rf"cannot read --note \S+/latin {unread}"),
        ([made / "dense5"], "file", None, r"cannot write to --out \S+/file: File exists; give a folder"),
    ):
        with pytest.raises(UserError, match=f"^{message}") as caught:
            write_report(runs, tmp_path / out, "T", note)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_bytes() == b""
