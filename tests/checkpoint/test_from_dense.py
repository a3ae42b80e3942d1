"""A sparse model that starts from a dense one, optimizers of every kind, and the stock ways to load a checkpoint."""

import pytest
import ranks
import recorded
import torch
from checkpoint_ranks import resume_all, save
from exactness import arguments
from fairseq.optim import OPTIMIZER_REGISTRY
from plugin import losses, train

DENSE = ("--router", "none", "--optimizer", "adam", "--lr", "1e-3", "--max-tokens", "48")
SPARSE = ("--num-experts", "4", "--sparse-layers", "0,1", "--max-tokens", "48")


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """The checkpoint of a trained dense model, and its next losses."""
    folder = tmp_path_factory.mktemp("dense model")
    save(str(data), (*DENSE, "--save-dir", str(folder)), 5)
    reset = ("--restore-file", str(folder / "checkpoint_last.pt"), "--reset-optimizer", "--reset-dataloader")
    reset += ("--reset-lr-scheduler", "--reset-meters")
    return folder / "checkpoint_last.pt", first_losses(data, *DENSE, *reset)


def first_losses(data, *words):
    """Return the loss of the first update of a training, which is the loss of the weights it starts from."""
    trainer, epoch_itr = recorded.make_trainer(data, words)
    record = recorded.keep_losses_and_norms(trainer)
    recorded.run(trainer, epoch_itr, trainer.get_num_updates() + 1)
    return record["loss"]


@pytest.mark.parametrize(
    ("router", "placement", "more"),
    [
        ("hash", "replace", ()),
        ("hash", "replace", ("--multi-hash", "4")),
        ("hash", "replace", ("--experts-per-token", "3", "--hash-weights", "learned", "--shared-expert")),
        ("hash", "insert", ("--memory-layers", "0,1")),
        ("switch", "insert", ()),
        ("base", "insert", ()),
    ],
)
def test_the_first_loss_is_that_of_the_dense_model(data, dense, router, placement, more):
    path, expected = dense
    words = ("--router", router, *SPARSE, *more, "--sparse-placement", placement, "--from-dense", str(path))
    words = ("--load-balance-weight", "0", *words)  # the cross-entropy alone
    assert first_losses(data, *words) == pytest.approx(expected, rel=1e-6)
    assert first_losses(data, *words[:-2]) != pytest.approx(expected, rel=1e-3)


def test_every_expert_starts_as_the_dense_ffn(data, dense):
    path, _ = dense
    saved = torch.load(path, weights_only=True)["model"]
    words = ("--router", "switch", *SPARSE[:2], "--sparse-layers", "1", "--max-tokens", "48", "--from-dense", str(path))
    model = recorded.make_trainer(data, words)[0].get_model()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            ffn = saved[name.replace("sparse.experts.", "").replace("_weight", ".weight").replace("_bias", ".bias")]
            assert all(torch.equal(row, ffn) for row in parameter)
        elif ".router." not in name:
            assert torch.equal(parameter, saved[name])


def test_ranks_start_from_a_dense_model(data, dense):
    path, _ = dense
    words = ("--router", "hash", *SPARSE, "--from-dense", str(path), "--optimizer", "sgd", "--lr", "0")
    alone = first_losses(data, *words, "--update-freq", "2")
    both = ranks.run(2, "recorded:train_all", str(data), {"started": words})
    assert both[0]["started"]["loss"][0] == pytest.approx(alone[0], rel=1e-6)


def test_a_dense_start_is_for_new_trainings(data, dense, tmp_path):
    """A resumed training goes on from its own checkpoint; a file of another kind or size is refused."""
    path, _ = dense
    words = ("--router", "hash", *SPARSE, "--save-dir", str(tmp_path), "--optimizer", "adam", "--lr", "1e-3")
    before = save(str(data), (*words, "--from-dense", str(path)), 2)
    after = resume_all(str(data), {"": (*words, "--from-dense", str(path))}, 2)[""]
    assert after["at"] == 2
    assert all(torch.equal(before["state"][name], value) for name, value in after["loaded"].items())
    shapes = r"\(32, 16\), those of this model \(64, 16\)"
    for given, message in (
        ((tmp_path / "checkpoint_last.pt",), "is a sparse model already; use --finetune-from-model"),
        ((tmp_path / "nothing.pt",), "nothing.pt does not exist"),
        ((path, "--decoder-ffn-embed-dim", "64"), rf"checkpoint_last.pt: the experts in .* have shape {shapes}"),
        ((path, "--decoder-layers", "3"), "does not fit this model: it lacks decoder.layers.2"),
        ((path, "--expert-form", "swiglu"), "--from-dense copies a plain FFN"),
        ((path, "--router", "none"), "needs experts"),
    ):
        with pytest.raises(SystemExit, match=message):
            recorded.make_trainer(data, ("--router", "hash", *SPARSE, "--from-dense", *map(str, given)))


# Those that fairseq has and that run on a CPU; the composite one wants a file of its own.
OPTIMIZERS = sorted(OPTIMIZER_REGISTRY.keys() - {"composite", "lamb", "cpu_adam", "nag"})


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "nag"])
def test_every_optimizer_resumes(data, tmp_path, optimizer):
    """fairseq's older optimizers keep their options in a way that needs code to be read back; ours do not."""
    lr = "1e-3" if optimizer != "sgd" else "0.1"
    words = ("--router", "hash", *SPARSE, "--optimizer", optimizer, "--lr", lr)
    whole = recorded.train(data, words, 4)
    kept = (*words, "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, kept)
    recorded.run(trainer, epoch_itr, 2)
    recorded.checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    trainer, epoch_itr = recorded.make_trainer(data, kept)
    record = recorded.keep_losses_and_norms(trainer)
    recorded.run(trainer, epoch_itr, 4)
    assert record["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)
    for name, parameter in trainer.get_model().named_parameters():
        torch.testing.assert_close(parameter.detach(), whole["parameters"][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["--bf16", pytest.param("--memory-efficient-bf16", marks=pytest.mark.slow)])
def test_half_precision_loads_at_another_number_of_ranks(data, tmp_path, form):
    words = arguments("hash", 4, "adam", form, "--save-dir", str(tmp_path))
    one, two = ranks.run(2, "checkpoint_ranks:save_half", str(data), (*words, "--update-freq", "1"), 3)
    alone = ranks.run(1, "checkpoint_ranks:load_half", str(data), (*words, "--update-freq", "2"))[0]
    for name, value in alone.items():
        parts = [one[name], two[name]] if ".experts." in name else [one[name]]
        assert torch.equal(value, torch.cat(parts)), name


def test_finetuning_from_a_checkpoint_of_several_ranks(data, tmp_path):
    """--finetune-from-model takes the weights alone; the optimizer's shards may be gone."""
    first = tmp_path / "first"
    words = arguments("hash", 4, "adam", "--save-dir", str(first))
    saved = ranks.run(2, "checkpoint_ranks:save", str(data), words, 3)
    for shard in first.glob("experts/*.optimizer.*"):
        shard.unlink()
    sparse = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--max-update", "1")
    done = train(data, tmp_path / "second", *sparse, "--finetune-from-model", first / "checkpoint_last.pt")
    assert "dataloader will be reset" in done.stdout + done.stderr
    started = losses(train(data, tmp_path / "third", *sparse))
    assert len(saved) == 2 and losses(done)[0] < started[0]
