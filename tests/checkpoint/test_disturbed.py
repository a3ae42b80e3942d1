"""What is done to files and clock while a training runs: data gone, a read-only folder, a copy, an earlier time."""

import os
import shutil
import subprocess
import threading
import time

import pytest
import recorded
import torch
from fairseq import checkpoint_utils
from saved_checkpoints import state_of

from fairseq_hash.core.errors import UserError

WORDS = ("--router", "hash", "--num-experts", "6", "--sparse-layers", "0,1", "--max-tokens", "48", "--clip-norm", "0.2")
WORDS += ("--train-subset", "valid", "--valid-subset", "test")


def trainer_in(folder, data, *more):
    """Return a trainer that saves in a folder, and its iterator."""
    return recorded.make_trainer(data, (*WORDS, "--save-dir", str(folder), "--no-epoch-checkpoints", *more))


def save(trainer, epoch_itr):
    """Save as fairseq does in the middle of an epoch."""
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, None)


def copied(state):
    """Return tensors that stay as they are."""
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one, other):
    """Return whether two states have equal tensors."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_clock_that_is_set_back_changes_nothing(data, tmp_path, monkeypatch):
    states = []
    for name, hours in (("as it goes", 0), ("set back", 5)):
        trainer, epoch_itr = trainer_in(tmp_path / name, data)
        recorded.run(trainer, epoch_itr, 3)
        save(trainer, epoch_itr)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda now=time.time, hours=hours: now() - 3600 * hours)
            save(trainer, epoch_itr)  # the same update again, of an earlier time
            again, epoch_itr = trainer_in(tmp_path / name, data)
            recorded.run(again, epoch_itr, 6)
            save(again, epoch_itr)
            states.append(copied(state_of(trainer_in(tmp_path / name, data)[0])))
    assert same(*states)


def test_data_that_are_removed_in_an_epoch_serve_it_to_its_end(data, tmp_path):
    """Mapped files live as long as they are mapped; the next epoch, of another folder, ends in one line."""
    losses = []
    for removes in (False, True):
        first, second = (shutil.copytree(data, tmp_path / f"{name} {removes}") for name in ("first", "second"))
        trainer, epoch_itr = trainer_in(tmp_path / f"saved {removes}", f"{first}{os.pathsep}{second}")
        record, step = recorded.keep_losses_and_norms(trainer), trainer.task.train_step

        def train_step(*args, step=step, trainer=trainer, folders=(first, second) if removes else (), **kwargs):
            if trainer.get_num_updates() == 2:
                for folder in folders:
                    shutil.rmtree(folder)
            return step(*args, **kwargs)

        trainer.task.train_step = train_step
        recorded.run(trainer, epoch_itr, 12)
        losses.append(record["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(SystemExit, match=f"^fairseq_hash: {second} has no subset valid "):
        trainer.get_train_iterator(2)


def test_a_folder_that_becomes_read_only(data, tmp_path):
    saved = tmp_path / "saved"
    trainer, epoch_itr = trainer_in(saved, data)
    recorded.run(trainer, epoch_itr, 2)
    save(trainer, epoch_itr)
    at_two = copied(state_of(trainer))
    recorded.run(trainer, epoch_itr, 3)
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", saved, saved], capture_output=True).returncode:
        pytest.skip("only root can make a folder read-only for itself, and not on every machine")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", saved], check=True)
        with pytest.raises(
            SystemExit, match=r"Read-only file system\); earlier checkpoints are whole, make the folder"
        ):
            save(trainer, epoch_itr)
    finally:
        subprocess.run(["umount", saved], check=True)
    assert same(state_of(trainer_in(saved, data)[0]), at_two)


def test_a_folder_that_is_gone(data, tmp_path):
    saved = tmp_path / "saved"
    trainer, epoch_itr = trainer_in(saved, data)
    recorded.run(trainer, epoch_itr, 2)
    save(trainer, epoch_itr)
    with pytest.raises(UserError, match="cannot be written: its folder is gone; bring it back"):
        trainer.save_checkpoint(str(tmp_path / "gone" / "checkpoint_last.pt"), {})


def test_a_copy_of_the_folder_while_a_save_goes_on_is_whole_or_refused(data, tmp_path):
    saved, copies, is_over = tmp_path / "saved", [], threading.Event()

    def copy_all_the_time():
        while not is_over.is_set() and len(copies) < 8:
            target = tmp_path / f"copy {len(copies)}"
            subprocess.run(["cp", "-r", saved, target], capture_output=True)  # a file may be gone when it comes to it
            copies.append(target)

    trainer, epoch_itr = trainer_in(saved, data, "--save-interval-updates", "1", "--keep-interval-updates", "1")
    states = {}
    copier = threading.Thread(target=copy_all_the_time)
    for update in range(1, 12):
        recorded.run(trainer, epoch_itr, update)
        states[update] = copied(state_of(trainer))
        if update == 2:
            copier.start()
        save(trainer, epoch_itr)
    is_over.set()
    copier.join()

    loaded = 0
    for copy in copies:
        try:
            other, _ = trainer_in(copy, data)
        except SystemExit as error:
            assert str(error).startswith("fairseq_hash: ") and "\n" not in str(error)
            continue
        assert other.get_num_updates() > 0 and same(state_of(other), states[other.get_num_updates()])
        loaded += 1
    assert copies and loaded
