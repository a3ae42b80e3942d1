"""`--freeze`: what is frozen keeps every bit, and the rest trains as torch's own Adam trains it alone."""

import json
import logging
import math

import pytest
import ranks
import recorded
import torch
from exactness import TOLERANCE, relative, whole
from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap
from fairseq import checkpoint_utils, utils
from freezing_ranks import END, STOP, copy_of, parameters_of, stop_and_go_on
from plugin import build

from fairseq_hash.core.errors import UserError
from fairseq_hash.lm import model as hash_model
from fairseq_hash.options.sparse_options import SparseOptions

FROZEN = {"experts": True, "all-but-experts": False}  # whether the experts are
HASH = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1")
LEARNED = (*HASH, "--experts-per-token", "2", "--hash-weights", "learned", "--shared-expert")
SWITCH = ("--router", "switch", "--num-experts", "4", "--sparse-layers", "1")
INSERTED = ("--router", "base", "--sparse-placement", "insert", *HASH[2:])
# Clipping active, and a weight decay that would move every weight.
TRAINING = ("--optimizer", "adam", "--lr", "1e-3", "--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6")
TRAINING += ("--weight-decay", "0.1", "--clip-norm", "0.05", "--max-tokens", "48", "--dropout", "0.0")


def is_frozen(name, freeze):
    """Whether a parameter is; by its name."""
    return (".experts." in name or ".shared." in name) == FROZEN[freeze]


def by_hand(data, words, freeze, updates):
    """Return norms and parameters of a loop that knows the model only, and hands Adam the part that trains."""
    trainer, epoch_itr = recorded.make_trainer(data, words)
    model, criterion = trainer.get_model().train(), trainer.get_criterion().train()
    chosen = [p for name, p in model.named_parameters() if not is_frozen(name, freeze)]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    norms = []
    for update, sample in zip(range(1, updates + 1), epoch_itr.next_epoch_itr(), strict=False):
        # fairseq adds it before the correction of the second moment, torch behind.
        optimizer.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.98**update)
        loss, size, _ = criterion(model, sample)
        for parameter, gradient in zip(chosen, torch.autograd.grad(loss / size, chosen), strict=True):
            parameter.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(chosen, 0.05)))
        optimizer.step()
    return norms, parameters_of(trainer)


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize(
    "words",
    [LEARNED, SWITCH, (*SWITCH, "--checkpoint-activations"), INSERTED],
    ids=["hash", "switch", "checkpointed", "base, inserted"],
)
def test_the_rest_trains_as_adam_trains_it_alone(data, freeze, words):
    words = (*words, *TRAINING)
    norms, expected = by_hand(data, [w for w in words if w != "--checkpoint-activations"], freeze, 5)
    trainer, epoch_itr = recorded.make_trainer(data, (*words, "--freeze", freeze))
    before, record = parameters_of(trainer), recorded.keep_losses_and_norms(trainer)
    recorded.run(trainer, epoch_itr, 5)
    assert record["norm"] == pytest.approx(norms, rel=TOLERANCE) and min(norms) > 0.05
    for name, value in parameters_of(trainer).items():
        assert torch.equal(value, before[name]) == is_frozen(name, freeze), name
        torch.testing.assert_close(value, expected[name], rtol=TOLERANCE, atol=1e-6)  # of updates of 1e-3
    trained = [p for name, p in trainer.get_model().named_parameters() if not is_frozen(name, freeze)]
    kept = trainer.optimizer.optimizer.state
    assert len(kept) == len(trained) and all(parameter in kept for parameter in trained)


@pytest.mark.parametrize("freeze", ["none", *FROZEN])
def test_the_record_counts_what_trains(data, caplog, freeze):
    with caplog.at_level(logging.INFO):
        model = build(data, *LEARNED, "--freeze", freeze)[2]
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("model_record | "))
    record = json.loads(line.removeprefix("model_record | "))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if freeze == "none" or not is_frozen(name, freeze))
    assert (record["freeze"], record["parameters_trained"]) == (freeze, trained)
    assert record["parameters_total"] == sum(sizes.values())


# Experts that are shared by two ranks; of the last of these nothing is left that torch's wrapper would reduce.
SHARED = {"experts": LEARNED, "all-but-experts": HASH}
BACKENDS = ("legacy_ddp", "pytorch_ddp")


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Return the folder of checkpoints, the records of one process by case, and those of two ranks."""
    root = tmp_path_factory.mktemp("frozen")

    def of(freeze, world_size, backend):
        words = (*SHARED[freeze], *TRAINING, "--freeze", freeze, "--ddp-backend", backend)
        folder = root / f"{freeze}, {world_size}, {backend}"
        return (*words, "--update-freq", str(2 // world_size), "--save-dir", str(folder))

    one = {freeze: of(freeze, 1, "legacy_ddp") for freeze in SHARED}
    two = {f"{freeze}, {backend}": of(freeze, 2, backend) for freeze in SHARED for backend in BACKENDS}
    both = ranks.run(2, "freezing_ranks:stop_and_go_on", str(data), two)
    return root, one, stop_and_go_on(data, one), both


def assert_same(one, other):
    """Check that two states are the same, to the bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("freeze", SHARED)
def test_ranks_that_share_experts_train_and_resume_as_one_process(stopped, freeze, backend):
    _, _, alone, both = stopped
    one, many = alone[freeze], [record[f"{freeze}, {backend}"] for record in both]
    assert [record["size"] for record in many] == [2, 2]
    for record in (one, *many):
        first, second = record["whole"], record["resumed"]
        for what in ("loss", "norm"):  # to the bit
            assert second[what] == first[what][STOP:] and len(second[what]) == END - STOP
        assert_same(second["loaded"], record["saved"])
        assert_same(second["state"], first["state"])
        for key, value in first["start"].items():
            assert torch.equal(value, first["state"][key]) == is_frozen(key, freeze), key
            assert (f"{key} exp_avg" in first["state"]) != is_frozen(key, freeze), key
    for what in ("loss", "norm"):
        assert many[0]["whole"][what] == pytest.approx(one["whole"][what], rel=TOLERANCE)
        assert many[0]["whole"][what] == many[1]["whole"][what]
    assert min(one["whole"]["norm"]) > 0.05
    for key, value in one["whole"]["state"].items():
        if "k_proj.bias " not in key:  # moments of a gradient that is rounding
            assert relative(whole(many, lambda record: record["whole"]["state"], key), value) < TOLERANCE, key


@pytest.mark.parametrize("freeze", FROZEN)
def test_a_frozen_part_has_no_optimizer_state_in_files(data, stopped, freeze):
    """And one process goes on from what two ranks saved."""
    root, words, alone, _ = stopped
    folder = root / f"{freeze}, 2, legacy_ddp"
    parts = {path.name.split(".")[2] for path in folder.glob("experts/*.safetensors")}
    assert parts == ({"weights"} if FROZEN[freeze] else {"weights", "optimizer"})
    saved = torch.load(folder / "checkpoint_last.pt", weights_only=True)["last_optimizer_state"]["state"]
    moments = sum("exp_avg" in state for state in saved.values())
    names = [name for name in alone[freeze]["whole"]["start"] if ".experts." not in name]
    assert moments == sum(not is_frozen(name, freeze) for name in names)
    given = (*words[freeze], "--save-dir", str(folder), "--no-save")
    trainer, epoch_itr = recorded.make_trainer(data, given)
    recorded.run(trainer, epoch_itr, END)
    for key, value in alone[freeze]["whole"]["state"].items():
        if "k_proj.bias " not in key:
            assert relative(copy_of(trainer)[key], value) < TOLERANCE, key


def test_another_freeze_is_a_new_training(data, stopped, tmp_path):
    """Resuming is refused in one line; without the optimizer's state, and in fine-tuning, the weights are taken."""
    root, words, alone, _ = stopped
    folder = root / "experts, 2, legacy_ddp"
    other = (*words["experts"], "--freeze", "all-but-experts", "--save-dir", str(folder))
    message = "last.pt was saved with --freeze experts, this training has --freeze all-but-experts; resume with"
    with pytest.raises(SystemExit, match=message):
        recorded.make_trainer(data, other)
    both = ("--freeze", "all-but-experts", "--no-save")
    for more in (
        (*both, "--save-dir", str(folder), "--reset-optimizer", "--reset-dataloader"),
        (*both, "--save-dir", str(tmp_path), "--finetune-from-model", str(folder / "checkpoint_last.pt")),
    ):
        trainer, epoch_itr = recorded.make_trainer(data, (*words["experts"], *more))
        start = parameters_of(trainer)
        for name, value in alone["experts"]["saved"].items():
            assert name not in start or relative(start[name], value) < TOLERANCE
        assert not trainer.optimizer.optimizer.state
        recorded.run(trainer, epoch_itr, trainer.get_num_updates() + 1)
        for name, value in parameters_of(trainer).items():
            assert torch.equal(value, start[name]) == is_frozen(name, "all-but-experts"), name


def test_evaluation_is_the_same(stopped):
    """A checkpoint's configuration has the option, and the model that evaluates nothing of it."""
    root, _, _, both = stopped
    path = str(root / "experts, 2, legacy_ddp" / "checkpoint_last.pt")
    (model,), _ = checkpoint_utils.load_model_ensemble([path])
    saved = [record["experts, legacy_ddp"] for record in both]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, whole(saved, lambda record: record["saved"], name)), name


@pytest.mark.parametrize("freeze", FROZEN)
def test_half_precision(data, tmp_path, freeze):
    words = (*LEARNED, *TRAINING, "--bf16", "--freeze", freeze, "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, words)
    start = parameters_of(trainer)
    recorded.run(trainer, epoch_itr, 3)
    for name, value in parameters_of(trainer).items():
        assert value.dtype == torch.bfloat16 and (not is_frozen(name, freeze) or torch.equal(value, start[name]))
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    again = recorded.make_trainer(data, words)[0]
    for one, other in zip(
        *(t.optimizer.optimizer.state_dict()["state"].values() for t in (trainer, again)), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])) for key, value in one.items())


def test_gradients_of_nothing_but_shared_experts_are_clipped():
    """fairseq alone says 0, and scales nothing."""
    expert = torch.nn.Parameter(torch.ones(4))
    expert.expert, expert.grad = True, torch.full((4,), 3.0)
    norm = utils.clip_grad_norm_([expert], 1.5, lambda others: (others.square() + expert.grad.square().sum()).sqrt())
    assert float(norm) == 6 and expert.grad.tolist() == pytest.approx([0.75] * 4)


def test_refusals(data, monkeypatch):
    for words, message in (
        (("--router", "none", "--freeze", "experts"), "--freeze experts needs experts"),
        ((*HASH, "--freeze", "router"), "--freeze router is unknown; use one of none, experts, all-but-experts"),
    ):
        with pytest.raises(SystemExit, match=message):
            build(data, *words)
    # Fully sharded data parallel builds models in this context, and runs on CUDA only.
    monkeypatch.setattr(ConfigAutoWrap, "in_autowrap_context", True)
    monkeypatch.setattr(hash_model, "check_device", lambda **_: None)
    options = SparseOptions(router="hash", sparse_layers="1", freeze="experts")
    with pytest.raises(UserError, match="--freeze experts does not go with --ddp-backend fully_sharded"):
        hash_model.check_options(None, options, is_evaluation=False)
