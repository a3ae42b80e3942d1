"""TensorBoard's files of a real training, read back: numbers and loads are the log's, and each says what it is."""

import pytest
from plugin import ROUTERS, records, train
from tensorboard import data_compat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from fairseq_hash.fairseq_patches.tensorboard import DESCRIPTIONS, OF_LAYER, description_of

# Counts of where a training is, which need no words.
PLAIN = {"epoch", "num_updates", "update"}


@pytest.fixture(scope="module", params=["hash", "switch"])
def trained(request, data, tmp_path_factory):
    """The finished command, and the folder of its events."""
    folder = tmp_path_factory.mktemp("board")
    options = (*ROUTERS[request.param], "--log-expert-loads", "--tensorboard-logdir", folder / "board", "--no-save")
    return train(data, folder / "run", *options), folder / "board"


def events_of(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


@pytest.mark.parametrize("tag", ["train_inner", "valid"])
def test_events_are_the_logs_numbers(trained, tag):
    """1e-6: events have 32 bits."""
    done, board = trained
    prefix = "valid_" if tag == "valid" else ""
    logged = {int(one[f"{prefix}num_updates"]): one for one in records(done, tag)}
    events = events_of(board / tag)
    for name in ("ppl", "layer1_load_max", "layer1_dropped"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert list(found) == list(logged)
        for update, value in found.items():
            # A log rounds, TensorBoard's numbers are as they are.
            assert value == pytest.approx(
                float(logged[update][prefix + name]), rel=1e-6, abs=5.1e-3 if name == "ppl" else 5e-6
            )
    histograms = {event.step: event.histogram_value for event in events.Histograms("layer1_load")}
    assert list(histograms) == list(logged)
    for update, found in histograms.items():
        relative = [
            len(logged[update][f"{prefix}layer1_load"]) * share for share in logged[update][f"{prefix}layer1_load"]
        ]
        assert found.num == len(relative) == 4 and sum(found.bucket) == 4
        assert (found.min, found.max, found.sum) == pytest.approx(
            (min(relative), max(relative), sum(relative)), rel=1e-5
        )


def test_every_number_says_what_it_is(trained):
    """Also after TensorBoard has turned it into its newer form, which is what its page shows."""
    done, board = trained
    seen = set()
    for tag in ("train_inner", "train", "valid"):
        events = events_of(board / tag)
        for name in (*events.Tags()["scalars"], *events.Tags()["histograms"]):
            if name not in PLAIN:
                assert events.SummaryMetadata(name).summary_description == description_of(name) != "", name
                seen.add(name)
    assert {"layer1_load", "layer1_load_max", "ppl", "lr", "gnorm"} <= seen
    (file,) = (board / "train_inner").iterdir()
    first = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            first.setdefault(value.tag, data_compat.migrate_value(value).metadata)
    assert first["ppl"].summary_description == DESCRIPTIONS["ppl"] and first["ppl"].plugin_data.plugin_name == "scalars"
    assert first["layer1_load"].plugin_data.plugin_name == "histograms"
    assert first["layer1_load"].summary_description == f"Layer 1 (the first is 0): {OF_LAYER['load']}"


def test_names_that_are_not_known():
    assert description_of("mine") == description_of("layer1_mine") == "" and "3" in description_of("layer3_load_cv")
