"""Perplexity by the number of experts, the curves of many models, and loads in a grid: what is drawn, on made logs."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import write_run

from fairseq_hash.reporting import drawing
from fairseq_hash.reporting.curves import learning_charts
from fairseq_hash.reporting.drawing import MOST_LABELLED, draw, labelled
from fairseq_hash.reporting.loads import load_charts
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.runs import load_runs
from fairseq_hash.reporting.scaling import scaling_charts
from fairseq_hash.reporting.theme import DARK, LIGHT

MEASURED = {("hash", 4): [30, 32], ("hash", 8): [28, 29], ("hash", 16): [27], ("switch", 4): [31], ("switch", 16): [26]}


@pytest.fixture
def runs(tmp_path):
    """Two routers at some numbers of experts, a dense model, and a table of its own; Hash 1x8 has a published one."""
    for (router, experts), values in MEASURED.items():
        given = {"valid": "28.25 A"} if (router, experts) == ("hash", 8) else {}
        experiment = {
            "name": f"{router.title()} 1x{experts}",
            "table": "t",
            "vocabulary": 100,
            "corpus": "a corpus",
            "published": given,
        }
        for seed, value in enumerate(values):
            record = {"router": router, "num_experts": experts}
            folder = tmp_path / f"{router}{experts}" / f"seed{seed}"
            write_run(folder, experiment, {"common.seed": seed}, {"valid": value, "test": 99}, **record)
    dense = {
        "name": "Dense",
        "table": "t",
        "vocabulary": 100,
        "corpus": "a corpus",
        "published": {"valid": "33.5 S", "test": "34 S"},
    }
    write_run(tmp_path / "dense", dense, None, {"valid": 35, "test": 99}, router="none", num_experts=1)
    clusters = {"name": "Clusters", "table": "t", "vocabulary": 100, "corpus": "a corpus"}
    write_run(tmp_path / "clusters", clusters, {"model.hash_table": "c"}, {"valid": 40, "test": 99}, num_experts=8)
    return tmp_path


def models_of(folder):
    return group_by_model(load_runs([folder]))


def test_a_line_for_models_that_differ_in_their_experts_only(runs, drawn):
    """Means by hand, whiskers from the lowest to the highest seed, dense level, published hollow in the same colour."""
    (axes,) = draw(scaling_charts(models_of(runs)), LIGHT).axes
    solid = [line for line in axes.lines if line.get_markerfacecolor() != "none"]
    for router, means, whiskers in zip(("hash", "switch"), solid, axes.collections, strict=False):
        expected = {experts: values for (name, experts), values in MEASURED.items() if name == router}
        assert [*means.get_xdata()] == sorted(expected)
        assert [*means.get_ydata()] == [statistics.fmean(expected[experts]) for experts in sorted(expected)]
        ends = [(low, high) for (_, low), (_, high) in whiskers.get_segments()]
        assert ends == [(min(expected[experts]), max(expected[experts])) for experts in sorted(expected)]
    (line,) = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert (line.get_color(), [*line.get_xdata()], [*line.get_ydata()]) == (solid[0].get_color(), [8], [28.25])
    level = [line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    assert [line.get_ydata()[0] for line in level] == [35, 33.5]
    assert {text.get_text() for text in axes.texts} == {"Hash 1xE 27.0", "Switch 1xE 26.0", "Dense 35.0"}
    assert [*axes.get_xticks()] == [4, 8, 16] and axes.get_xscale() == "log"
    assert "published, not measured here" in axes.figure.texts[-1].get_text()


def test_no_line_of_one_point(runs, drawn):
    """Of all models but one number of experts each, there is no figure."""
    models = models_of(runs)
    few = {name: models[name] for name in ("Hash 1x4", "Switch 1x16", "Clusters", "Dense")}
    assert draw(scaling_charts(few), LIGHT) is None
    assert draw(scaling_charts({**few, "Hash 1x16": models["Hash 1x16"]}), LIGHT) is not None


def test_lines_without_experiments_are_named_by_router(tmp_path, drawn):
    for table in ("balanced", "random"):
        for experts in (4, 8):
            write_run(tmp_path / f"{table}{experts}", None, {"model.hash_table": table}, num_experts=experts)
    (axes,) = draw(scaling_charts(models_of(tmp_path)), LIGHT).axes
    assert {text.get_text() for text in axes.texts} == {"Hash hash_table=balanced 20.0", "Hash hash_table=random 20.0"}


def test_published_figures_of_another_dictionary_are_not_drawn(runs, drawn):
    """The run's dictionary has 104 symbols."""
    for log in runs.rglob("rank0.log"):
        log.write_text(log.read_text().replace("dictionary: 104 types", "dictionary: 64 types"))
    (axes,) = draw(scaling_charts(models_of(runs)), LIGHT).axes
    assert not [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert "published" not in axes.figure.texts[-1].get_text()


def test_published_curves_are_hollow_and_by_updates_only(tmp_path, drawn):
    """Those within the training's updates."""
    given = {"valid_by_update": {1: "52.5 A", 3: "33.5 S", 90: "1.5 A"}}
    write_run(
        tmp_path / "run", {"name": "Hash", "table": "t", "vocabulary": 100, "corpus": "a corpus", "published": given}
    )
    by_updates, by_time = draw(learning_charts(models_of(tmp_path)), LIGHT).axes
    hollow = [line for line in by_updates.lines if line.get_markerfacecolor() == "none"]
    assert [([*line.get_xdata()], [*line.get_ydata()]) for line in hollow] == [([1, 3], [52.5, 33.5])]
    assert not [line for line in by_time.lines if line.get_markerfacecolor() == "none"]
    assert "Hollow: published, not measured here." in by_updates.figure.texts[-1].get_text()
    assert by_updates.get_ylim()[0] < 30 and by_updates.get_ylim()[1] >= 52.5


def test_of_many_models_the_best_and_the_dense_are_labelled(tmp_path, drawn):
    """14 models that end at 31 to 44; the dense one is the worst."""
    for number in range(14):
        record = {"router": "none" if number == 13 else "hash", "num_experts": 1 if number == 13 else 4}
        curve = [{"ppl": 60}, {"ppl": 50}, {"ppl": 40}, {"ppl": 31 + number}]
        experiment = {"name": f"M{number}", "table": "t"}
        write_run(tmp_path / f"{number}", experiment, {"model.hash_seed": number}, intervals=curve, **record)
    models = models_of(tmp_path)
    best = [*(f"M{number}" for number in range(MOST_LABELLED - 1)), "M13"]
    assert list(labelled(learning_charts(models)[0])) == best
    figure = draw(learning_charts(models), LIGHT)
    for axes in figure.axes:
        assert {text.get_text().split()[0] for text in axes.texts} == set(best)
        assert len(axes.lines) == 14  # no training beside the validations
        strong = [line.get_color() for line in axes.lines if line.get_linewidth() > 1]
        assert len(set(strong)) == MOST_LABELLED == len(strong)
    assert "Grey: 4 more" in figure.texts[-1].get_text()


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.data())
def test_labels_never_overlap(wanted, data):
    """From 0 up, and to 1 where there is room; where nothing overlaps, labels stay where they are wanted."""
    heights = data.draw(st.lists(st.sampled_from([0.05, 0.1]), min_size=len(wanted), max_size=len(wanted)))
    places = drawing.spread(sorted(wanted), heights)
    apart = (np.array(heights[1:]) + np.array(heights[:-1])) / 2
    assert np.all(np.diff(places) >= apart - 1e-9) and places[0] >= 0
    assert places[-1] <= max(1, apart.sum()) + 1e-9
    if np.all(np.diff(sorted(wanted)) > 0.1) and min(wanted) >= 0 and max(wanted) <= 1:
        assert places == pytest.approx(sorted(wanted))


def test_labels_that_are_wanted_at_one_place_stand_around_it():
    assert drawing.spread([0.5, 0.5, 0.5], [0.1] * 3) == pytest.approx([0.4, 0.5, 0.6])
    assert drawing.spread([0.0, 0.0], [0.1, 0.1]) == pytest.approx([0.0, 0.1])
    assert drawing.spread([1.0, 1.0], [0.1, 0.3]) == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize(
    ("layers", "shape", "shown"),
    [(1, (1, 1), [0]), (3, (2, 2), [0, 1, 2]), (8, (3, 2), [0, 1, 3, 4, 6, 7])],
)
def test_loads_are_wrapped_in_a_grid(tmp_path, drawn, layers, shape, shown):
    """A panel for each layer, two in a row; of many layers six, from the first to the last."""
    logged = {f"layer{layer}_load": [0.5, 0.25, 0.25] for layer in range(layers)}
    logged |= {f"layer{layer}_load_max": 1.5 for layer in range(layers)}
    for number in range(3):
        options = {"model.hash_seed": number}
        write_run(tmp_path / f"{number}", {"name": f"M{number}"}, options, intervals=[{"ppl": 9, **logged}] * 4)
    figure = draw(load_charts(models_of(tmp_path)), DARK)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"Load of the experts, layer {layer}" for layer in shown]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    for axes in figure.axes:
        assert [[*line.get_ydata()] for line in axes.lines] == [[1.5, 0.75, 0.75]] * 3
