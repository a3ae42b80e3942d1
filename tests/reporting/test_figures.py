"""The figures: what is drawn are the log's numbers, and the files are pictures with each model's colour."""

import io
import itertools
import re
import statistics
import warnings

import matplotlib.image
import numpy as np
import pytest
from made_runs import NAMES, raw
from matplotlib.colors import to_rgb

from fairseq_hash.reporting.curves import learning_charts
from fairseq_hash.reporting.drawing import draw
from fairseq_hash.reporting.loads import load_charts
from fairseq_hash.reporting.naming import group_by_model, styles_of
from fairseq_hash.reporting.runs import load_runs
from fairseq_hash.reporting.theme import COLOURS, DARK, LIGHT


def models_of(folder, names=NAMES):
    return group_by_model(load_runs([folder / name for name in names]))


@pytest.fixture(autouse=True)
def no_warnings():
    """matplotlib warns where it cannot do what it was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_learning_curves_are_those_of_the_logs(made, drawn):
    """Each run's training and validation by updates; the same heights by time."""
    by_updates, by_time = draw(learning_charts(models_of(made)), LIGHT).axes
    assert len(by_updates.lines) == len(by_time.lines) == 2 * len(NAMES)
    for index, name in enumerate(NAMES):
        last = {int(r["num_updates"]): r for r in raw(made / name, "train_inner")}
        train, valid = by_updates.lines[2 * index : 2 * index + 2]
        assert [*train.get_xdata()] == list(range(1, 9))
        assert [*train.get_ydata()] == [float(last[update]["ppl"]) for update in range(1, 9)]
        checks = {int(r["valid_num_updates"]): float(r["valid_ppl"]) for r in raw(made / name, "valid")}
        assert dict(zip(valid.get_xdata(), valid.get_ydata(), strict=True)) == checks
        train_time, valid_time = by_time.lines[2 * index : 2 * index + 2]
        assert [*train_time.get_ydata()] == [*train.get_ydata()] and [*valid_time.get_ydata()] == [*valid.get_ydata()]
        if name == "dense6":  # resumed, where fairseq's clock stands still
            assert [*train_time.get_xdata()] == sorted(train_time.get_xdata())
            continue
        assert [*train_time.get_xdata()] == [float(last[update]["wall"]) / 60 for update in range(1, 9)]
        # Every validation is at an update that was logged.
        assert [*valid_time.get_xdata()] == [float(last[update]["wall"]) / 60 for update in (2, 4, 6, 8)]
    low, high = by_updates.get_ylim()
    assert all(low < y < high for line in by_updates.lines[1::2] for y in line.get_ydata())


def test_curves_are_labelled_with_their_last_values(made, drawn):
    """Of two seeds with the mean; labels do not overlap, so they stand in the order of their values."""
    for axes in draw(learning_charts(models_of(made)), LIGHT).axes:
        last = {name: float(raw(made / name, "valid")[-1]["valid_ppl"]) for name in NAMES}
        values = {"Dense": statistics.fmean([last["dense5"], last["dense6"]])}
        values |= {"Hash": last["hash5"], "Switch": last["switch5"]}
        labels = {text.get_text(): text.xyann[1] for text in axes.texts}
        assert set(labels) == {f"{model} {value:.1f}" for model, value in values.items()}
        heights = [labels[f"{model} {values[model]:.1f}"] for model in sorted(values, key=values.get)]
        assert all(upper - lower > 0.05 for lower, upper in itertools.pairwise(heights))


def test_the_first_fall_is_left_out(made, drawn):
    """Beside a perplexity of thousands at the start, all later differences would vanish."""
    models = models_of(made, ["dense5"])
    run = models["Dense"][0]
    run.training.validations[0] = {"ppl": 5000.0}
    axes = draw(learning_charts(models), LIGHT).axes[0]
    assert axes.get_ylim()[1] < 200 and 5000.0 in axes.lines[1].get_ydata()


def test_loads_are_the_mean_of_sorted_shares(made, drawn):
    """By plain Python: every settled interval is sorted, then averaged by rank, times the number of experts. 1e-9: sums
    in another order."""
    (axes,) = draw(load_charts(models_of(made)), LIGHT).axes
    assert axes.get_title(loc="left") == "Load of the experts, layer 1"
    labels = set()
    for number, (name, model) in enumerate((("hash5", "Hash"), ("switch5", "Switch"))):
        shares = [sorted(record["layer1_load"], reverse=True) for record in raw(made / name, "train_inner")[1:]]
        expected = [4 * statistics.fmean(column) for column in zip(*shares, strict=True)]
        train, valid = axes.lines[2 * number : 2 * number + 2]
        assert [*train.get_xdata()] == [*valid.get_xdata()] == [1, 2, 3, 4]
        assert [*train.get_ydata()] == pytest.approx(expected, rel=1e-9)
        last = sorted(raw(made / name, "valid")[-1]["valid_layer1_load"], reverse=True)
        assert [*valid.get_ydata()] == pytest.approx([4 * share for share in last], rel=1e-9)
        assert valid.get_markerfacecolor() == "none" and valid.get_color() == train.get_color()
        assert axes.get_ylim()[1] > expected[0]
        labels.add(f"{model} largest {expected[0]:.2f}")
    assert {text.get_text() for text in axes.texts} == labels
    assert "Hollow: validation at its end." in axes.figure.texts[-1].get_text()


def test_no_figure_without_loads(made, copies):
    assert draw(load_charts(models_of(made, ["dense5", "dense6"])), LIGHT) is None
    log = copies / "switch5" / "train.log"
    log.write_text(re.sub(r', "(valid_|train_)?layer1_load": \[[^]]*\]', "", log.read_text()))
    assert draw(load_charts(models_of(copies, ["switch5"])), LIGHT) is None
    assert draw(load_charts(models_of(copies, ["switch5", "hash5"])), LIGHT)


def share(png, colour):
    """Return the share of a PNG's pixels that have a colour, give or take one step of rounding in each channel."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[:, :, :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    return np.mean(np.abs(pixels - np.array(to_rgb(colour), dtype=np.float32)).max(axis=2) < 1.5 / 255)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("charts", [learning_charts, load_charts])
def test_pictures_show_each_model_in_its_colour(made, theme, charts):
    """Most is paper; ink and each model's colour are there. A dense model has no loads."""
    models = models_of(made)
    png = draw(charts(models), theme)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert share(png, theme.paper) > 0.5 and share(png, theme.ink) > 0.002
    colours = {model: theme.colour(number) for model, (number, _) in styles_of(models).items()}
    assert len(set(colours.values())) == 3
    for model, colour in colours.items():
        assert (share(png, colour) > 1e-4) == (model != "Dense" or charts is learning_charts), model


def test_dense_models_are_neutral_and_colours_go_round():
    """More models than colours share some, not fail. Dark screens have lighter ones, by hand."""

    class Named:
        def __init__(self, router):
            self.training = type("Training", (), {"model": {"router": router}})

    count = len(COLOURS)
    names = ["none", *["hash"] * (count + 2)]
    styles = styles_of({number: [Named(name)] for number, name in enumerate(names)})
    colours = [LIGHT.colour(number) for number, _ in styles.values()]
    assert colours[0] == LIGHT.neutral
    assert [colour.upper() for colour in colours[1 : count + 1]] == list(COLOURS)
    assert colours[count + 1 :] == colours[1:3]
    assert DARK.colour(0) == "#73b1d5"  # 0 + 0.45 * 255 = 115, 114 + 0.45 * 141 = 177, 178 + 0.45 * 77 = 213


@pytest.mark.parametrize("bad", ["inf", "nan"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_training_that_diverged_is_drawn(copies, drawn, bad, first):
    """The last of four validations, or all of them, is not finite: the axes show the finite ones, the label tells."""
    log = copies / "switch5" / "train.log"
    text = log.read_text()
    for found in reversed([*re.finditer(r'(?<="valid_ppl": ")[^"]*', text)][first:]):
        text = text[: found.start()] + bad + text[found.end() :]
    log.write_text(text)
    for names in (["switch5"], ["switch5", "hash5"]):
        axes = draw(learning_charts(models_of(copies, names)), LIGHT).axes[0]
        low, high = axes.get_ylim()
        assert 0 < low < high < 200
        heights = {text.get_text(): text.xyann[1] for text in axes.texts}
        assert heights[f"Switch {bad}"] == pytest.approx(1)  # the top of the axes, by logarithms


def test_without_validations_the_training_is_labelled(copies, drawn):
    """And the axes keep their size."""
    log = copies / "dense5" / "train.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "| valid |" not in line))
    figure = draw(learning_charts(models_of(copies, ["dense5"])), LIGHT)
    figure.draw_without_rendering()
    last = float(raw(copies / "dense5", "train_inner")[-1]["ppl"])
    for axes in figure.axes:
        assert axes.texts[0].get_text() == f"Dense {last:.1f}" and axes.get_position().width > 0.3
