"""The running average of the weights (`--store-ema`), against one computed here in float64."""

import itertools

import pytest
import ranks
import recorded
import torch
from called import refused
from fairseq import checkpoint_utils
from saved_checkpoints import done, load

SPARSE = (
    "--router",
    "hash",
    "--num-experts",
    "4",
    "--sparse-layers",
    "0,1",
    "--max-tokens",
    "64",
    "--clip-norm",
    "0.5",
)
TIED = ("--share-decoder-input-output-embed",)
AVERAGE = ("--store-ema", "--ema-decay", "0.7")
DECAY, UPDATES = 0.7, 6


def train(data, arguments, updates=UPDATES, is_saved=False):
    """Train; return the trainer, and the model's state after every update of this training."""
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    states, step = [], trainer.train_step

    def keep_state(samples):
        step(samples)
        states.append({name: value.clone() for name, value in trainer.get_model().state_dict().items()})

    trainer.train_step = keep_state
    recorded.run(trainer, epoch_itr, updates)
    if is_saved:
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    return trainer, states


def average_of(states, start=0, every=1, first=None):
    """Return the running average of floating-point numbers, and the last value of all else.

    The average begins with the state after the first update, or with `first`. Before update `start` it is the model.
    """
    average = {name: value.double() for name, value in (first or states[0]).items()}
    for update, state in enumerate(states, start=1):
        if update % every:
            continue
        decay = 0 if update < start else DECAY
        for name, value in state.items():
            is_number = value.is_floating_point()
            average[name] = decay * average[name] + (1 - decay) * value.double() if is_number else value
    return average


def assert_close(found, expected, tolerance=1e-6):
    """Compare two states: numbers to a tolerance, all else exactly."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("_float_tensor"):  # never set: fairseq reads its type alone
            continue
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), value, atol=tolerance, rtol=0, msg=name)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hash-table", "random"),
        TIED,
        ("--hash-feature", "bigram", "--hash-table", "random", "--multi-hash", "2"),
        ("--router", "switch", *TIED),
        ("--ema-start-update", "3"),
        ("--ema-update-freq", "2"),
        ("--ema-fp32", *TIED),
        ("--freeze", "experts"),
        ("--router", "none", *TIED),
    ],
    ids=" ".join,
)
def test_the_average_is_that_of_all_updates(data, arguments):
    trainer, states = train(data, (*SPARSE, *AVERAGE, *arguments))
    given = dict(itertools.pairwise(arguments))
    start, every = int(given.get("--ema-start-update", 0)), int(given.get("--ema-update-freq", 1))
    expected = average_of(states, start, every)
    assert_close(trainer.ema.get_model().state_dict(), expected)


def test_half_precision_is_averaged_in_fp32(data):
    arguments = (*SPARSE, *AVERAGE, *TIED, "--bf16", "--ema-fp32", "--lr", "1e-2")
    trainer, states = train(data, arguments)
    expected = average_of(states)
    assert states[0]["decoder.embed_tokens.weight"].dtype == torch.bfloat16
    assert_close(trainer.ema.fp32_params, expected)
    halves = {name: value.to(states[0][name].dtype).double() for name, value in expected.items()}
    assert_close(trainer.ema.get_model().state_dict(), halves, 4e-3)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The folder of a checkpoint after half of the updates, and the average and the states of a whole training."""
    folder = tmp_path_factory.mktemp("averaged")
    arguments = (*SPARSE, *AVERAGE, *TIED, "--update-freq", "2")
    train(data, (*arguments, "--save-dir", str(folder)), UPDATES // 2, is_saved=True)
    return folder, train(data, arguments)[1]


def go_on(data, arguments, updates=UPDATES):
    """Resume, train on, and return the average as `ranks` wants it."""
    return dict(train(data, arguments, updates)[0].ema.get_model().state_dict())


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_goes_on_from_a_checkpoint_at_any_number_of_ranks(data, saved, world_size):
    folder, states = saved
    more = (
        "--update-freq",
        str(2 // world_size),
        "--save-dir",
        str(folder),
        "--no-save",
        "--expert-parallel-size",
        "1",
    )
    given = (str(data), (*SPARSE, *AVERAGE, *TIED, *more))
    found = [go_on(*given)] if world_size == 1 else ranks.run(2, "test_averaging:go_on", *given)
    for average in found:
        assert_close(average, average_of(states), 1e-5)


def test_a_checkpoint_without_an_average_begins_one(data, tmp_path):
    folder = ("--save-dir", str(tmp_path))
    trainer, states = train(data, (*SPARSE, *folder), 2, is_saved=True)
    resumed, later = train(data, (*SPARSE, *AVERAGE, *folder), 4)
    assert_close(resumed.ema.get_model().state_dict(), average_of(later, first=states[-1]))


def test_the_average_alone_is_a_checkpoint(data, saved, tmp_path):
    """Its experts, too, which in the checkpoint lie in shards as they were trained."""
    folder, states = saved
    expected = average_of(states[: UPDATES // 2])
    done("merge", folder / "checkpoint_last.pt", "--ema", "--out", tmp_path / "average.pt")
    state = load(tmp_path / "average.pt")
    assert_close(state["model"], expected)
    assert "last_optimizer_state" not in state and "ema" not in state["extra_state"]
    checkpoint_utils.save_ema_as_checkpoint(str(folder / "checkpoint_last.pt"), str(tmp_path / "by fairseq.pt"))
    for name in ("average.pt", "by fairseq.pt"):
        [model], _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / name)])
        assert_close(model.state_dict(), expected)


def test_refusals(data, saved, tmp_path):
    train(data, (*SPARSE, "--save-dir", str(tmp_path)), 1, is_saved=True)
    line = refused("checkpoint", "merge", tmp_path / "checkpoint_last.pt", "--ema", "--out", tmp_path / "a.pt")
    assert line.endswith("has no running average of its weights; fairseq-train saves one with --store-ema")
    assert not (tmp_path / "a.pt").exists()
    with pytest.raises(SystemExit, match="has no running average of its weights"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "checkpoint_last.pt"))
    [said, _] = ranks.run(2, "test_averaging:refusal", str(data), (*SPARSE, *AVERAGE))
    assert said == 1


def refusal(data, arguments):
    """Return the status of a training whose ranks share experts."""
    try:
        recorded.make_trainer(data, arguments)
    except SystemExit as end:
        return end.code
