"""What cannot be used is refused before training, in one line that names the file; nothing starts anew by mistake.

All refusals come from the real commands' main function, in this process; training would be an error.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import recorded
import torch
from failing_ranks import assert_one_line, finish, run_ranks, start
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm as fairseq_eval_lm
from fairseq_cli import train as fairseq_train
from plugin import USER_DIR, swap_words, train, train_arguments
from saved_checkpoints import referenced, wait_for

from fairseq_hash.checkpoint import directory
from fairseq_hash.cli import main as fairseq_hash_command
from fairseq_hash.cli.tables import read_dictionary
from fairseq_hash.hashing import TableShape, build_table, save_table

SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--disable-validation")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A folder with checkpoints at updates 2 and 4, by `fairseq-train`."""
    folder = tmp_path_factory.mktemp("a run") / "saved"
    train(data, folder, *SPARSE, "--max-update", "4", "--save-interval-updates", "2")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of that folder to damage."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def refused(data, monkeypatch):
    """Return a function of options for `fairseq-train`: the one line with which it ends before it trains."""

    def one_line(main, argv):
        monkeypatch.setattr(sys, "argv", ["fairseq", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, str) and end.value.code.startswith("fairseq_hash: "), end.value.code
        assert "\n" not in end.value.code
        return end.value.code

    def of_training(folder, *options, corpus=data):
        monkeypatch.setattr(Trainer, "train_step", lambda *args, **kwargs: pytest.fail("it trains"))
        return one_line(fairseq_train.cli_main, train_arguments(corpus, folder, *SPARSE, *options))

    def of_evaluation(path, corpus=data):
        fixed = (corpus, "--user-dir", USER_DIR, "--cpu", "--tokens-per-sample", "16", "--gen-subset", "test")
        return one_line(fairseq_eval_lm.cli_main, (*fixed, "--path", path))

    of_training.evaluation = of_evaluation
    return of_training


def shards(folder, part, update=4):
    """Return the shards of an update."""
    return sorted((folder / "experts").glob(f"update-{update}.*.{part}.*"))


def flip_bit(path, place):
    """Change one bit of a file, at a byte counted from its end where negative."""
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))


def test_other_experts_table_or_dictionary_are_refused(data, run, refused, tmp_path):
    last = f"{run}/checkpoint_last.pt: "
    said = refused(run, "--num-experts", "8")
    assert f"{last}it has 4 experts, this model has 8; give --num-experts 4" in said
    symbols, _ = read_dictionary(data / "dict.txt")
    save_table(build_table("random", symbols, [1] * len(symbols), TableShape(4), seed=3), tmp_path / "table")
    said = refused(run, "--hash-table", tmp_path / "table")
    assert re.search(f"{re.escape(last)}it has hash table .*, this model has .*; write the checkpoint's", said)
    other = swap_words(data, tmp_path / "other")
    assert f"{last}it belongs to dictionary " in refused(run, corpus=other)
    assert f"{last}it belongs to dictionary " in refused.evaluation(run / "checkpoint_last.pt", corpus=other)
    said = refused(run, "--decoder-ffn-embed-dim", "64")
    assert f"{last}the experts in decoder.layers.0.sparse have shape (32, 16), those of this model (64, 16)" in said
    assert f"{last}it has 4 experts and --router hash; this model is dense" in refused(run, "--router", "none")
    assert f"{last[:-2]} does not fit this model: Missing key" in refused(run, "--decoder-layers", "3")


def test_a_dense_model_refuses_another_dictionary_or_kind(data, refused, tmp_path):
    train(data, tmp_path / "dense", "--router", "none", "--max-update", "1")
    last = f"{tmp_path}/dense/checkpoint_last.pt: "
    other = swap_words(data, tmp_path / "other")
    assert f"{last}it belongs to dictionary " in refused(tmp_path / "dense", "--router", "none", corpus=other)
    assert f"{last}it is a dense model, this one has experts" in refused(tmp_path / "dense")


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_damaged_shards_are_refused(copy, refused, part):
    [path] = shards(copy, part)
    whole = path.read_bytes()

    path.unlink()
    assert f"{path} cannot be read (No such file or directory), and the checkpoint needs it" in refused(copy)
    path.write_bytes(whole[:-1])
    assert f"{path} has {len(whole) - 1:,} bytes and had {len(whole):,}" in refused(copy)
    path.write_bytes(whole)
    flip_bit(path, -5)
    assert re.search(f"{re.escape(str(path))} is damaged: .* of expert 3 fails its checksum", refused(copy))
    path.write_bytes(whole)
    flip_bit(path, 40)
    assert f"{path} is not the file that the checkpoint means" in refused(copy)
    shutil.copyfile(shards(copy, part, update=2)[0], path)
    assert re.search(f"{re.escape(str(path))} is not the file .*: it belongs to save .* at update 2", refused(copy))


def test_evaluation_refuses_damaged_weights_and_needs_no_optimizer(copy, refused, data):
    [path] = shards(copy, "weights")
    shards(copy, "optimizer")[0].unlink()
    flip_bit(path, -5)
    assert f"{path} is damaged" in refused.evaluation(copy / "checkpoint_last.pt")


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_one_rank_that_finds_damage_ends_all(data, tmp_path, copy, part):
    [path] = shards(copy, part)
    flip_bit(path, -5)  # of expert 3, which rank 1 holds
    given = ("--num-experts", "4", "--sparse-layers", "0,1", "--restore-file", copy / "checkpoint_last.pt")
    said = run_ranks(tmp_path, [data] * 2, *given)
    main = re.escape(f"{copy}/checkpoint_last.pt")
    assert_one_line(said, rf"(rank 1: )?{main}: (rank 1: )?{re.escape(str(path))} is damaged: .*")


def test_damaged_main_files_are_refused(copy, refused):
    path = copy / "checkpoint_last.pt"
    whole = path.read_bytes()
    for torn in (b"", whole[:1000], whole[:-100]):
        path.unlink()
        path.write_bytes(torn)
        assert f"{path} is damaged or no checkpoint" in refused(copy)
    path.write_bytes(whole)
    weight = torch.load(path, weights_only=True)["model"]["decoder.embed_tokens.weight"]
    flip_bit(path, whole.index(weight.numpy().tobytes()) + 100)  # not in the space between tensors
    assert f"{path} is damaged: its contents fail their checksums" in refused(copy)


class Trap:
    """An object that runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_from_a_file_is_run(copy, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = copy / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    state["extra_state"]["trap"] = Trap()
    path.unlink()
    torch.save(state, path)
    for said in (refused(copy), refused.evaluation(path)):
        assert f"{path} is not loaded, as that would run code from the file: " in said and "mkdir" in said
    assert not (tmp_path / "executed").exists()


def test_no_training_starts_anew_by_mistake(copy, refused, tmp_path):
    nothing = tmp_path / "nothing.pt"
    for option in ("--restore-file", "--finetune-from-model", "--continue-once"):
        assert f"{nothing} does not exist; give an existing" in refused(tmp_path / "new", option, nothing)
    (copy / "checkpoint_last.pt").unlink()
    said = refused(copy)
    assert f"{copy} has checkpoint_1_2.pt, checkpoint_1_4.pt but no usable checkpoint_last.pt to go on from" in said
    assert f"{copy} has checkpoint_1_2.pt" in refused(copy, "--router", "none")
    (copy / "checkpoint_last.pt").symlink_to("gone.pt")
    assert "no usable checkpoint_last.pt" in refused(copy)


@pytest.mark.parametrize("has_last", [True, False])
def test_a_first_save_begins_with_the_name_to_go_on_from(data, tmp_path, monkeypatch, has_last):
    """An end between two names of one checkpoint leaves a folder from which training goes on."""
    words = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--optimizer", "adam", "--lr", "1e-3")
    words += ("--save-interval-updates", "2", "--save-dir", str(tmp_path / "saved"))
    trainer, epoch_itr = recorded.make_trainer(data, (*words, *(() if has_last else ("--no-last-checkpoints",))))
    recorded.run(trainer, epoch_itr, 2)

    def end(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_hash.fairseq_patches.checkpoints.duplicate", end)
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, None)
    [path] = (tmp_path / "saved").glob("*.pt")
    assert (path.name == "checkpoint_last.pt") == has_last


def test_two_trainings_do_not_share_a_folder(data, tmp_path):
    """The second is refused while the first lives, and not when it was killed."""
    folder = tmp_path / "saved"
    command = ["-m", "fairseq_cli.train"]
    endless = train_arguments(data, folder, *SPARSE, "--max-update", "100000", "--save-interval-updates", "1")
    first = start([*command, *endless], tmp_path / "first")
    try:
        wait_for(folder / "checkpoint_last.pt")
        second = start([*command, *endless], tmp_path / "second")
        [said] = finish([second], [tmp_path / "second"])
        line = f"fairseq_hash: --save-dir {folder} is in use by another training (process {first.pid} on "
        assert said.strip().splitlines()[-1].startswith(line) and "Traceback" not in said
    finally:
        first.kill()
        first.join()
    train(data, folder, *SPARSE, "--max-update", "1")


def test_a_read_replaces_nothing_for_others(data, tmp_path, monkeypatch):
    """`torch.load` is torch's for every thread while fairseq reads a checkpoint."""
    train(data, tmp_path, "--router", "none", "--max-update", "1", "--disable-validation")
    original, seen = torch.load, []
    upgrade = checkpoint_utils._upgrade_state_dict
    monkeypatch.setattr(
        checkpoint_utils, "_upgrade_state_dict", lambda state: seen.append(torch.load is original) or upgrade(state)
    )
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert seen == [True] and checkpoint_utils.torch is torch and "model" in state


BEST = "--save-interval-updates 2 --keep-best-checkpoints 1"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--save-interval-updates 2 --keep-interval-updates 1", {"checkpoint_1_6.pt"}),
        ("--max-tokens 2048 --keep-last-epochs 1 --max-update 12", {"checkpoint3.pt"}),
        (f"{BEST} --keep-interval-updates 1", {"checkpoint_1_6.pt", "checkpoint.best_loss_*.pt"}),
    ],
    ids=["interval", "epochs", "best"],
)
def test_shards_go_with_the_last_file_that_refers_to_them(data, tmp_path, options, kept):
    (tmp_path / "experts").mkdir()
    foreign = tmp_path / "experts" / "notes.txt"
    foreign.touch()
    validated = [option for option in SPARSE if option != "--disable-validation"]
    train(data, tmp_path, *validated, "--max-update", "6", *options.split())
    names = {re.sub(r"loss_[\d.]+\.pt", "loss_*.pt", path.name) for path in tmp_path.glob("*.pt")}
    assert names == kept | {"checkpoint_best.pt", "checkpoint_last.pt"}
    assert {path.name for path in (tmp_path / "experts").iterdir()} == {*referenced(tmp_path), foreign.name}


def test_leftovers_are_removed_at_the_start_and_nothing_else(copy):
    made = [".checkpoint_best.pt.partial", "experts/update-4.00000000.weights.0-3.safetensors"]
    made += ["experts/.update-6.00000000.optimizer.0-3.safetensors.partial"]
    others = ["notes.txt", ".checkpoint_best.pt.partial.txt", "experts/mine.safetensors", "checkpoint_last.pt.tmp"]
    before = {path for path in copy.rglob("*") if path.is_file()}
    for name in made + others:
        (copy / name).touch()
    directory.clean(copy)
    assert {path for path in copy.rglob("*") if path.is_file()} == before | {copy / name for name in others}
    # A main file that cannot be read may need any shard.
    (copy / "checkpoint_9_9.pt").write_bytes(b"PK")
    (copy / made[1]).touch()
    directory.clean(copy)
    assert (copy / made[1]).exists()


def test_a_full_disc_ends_the_training_and_keeps_what_there_was(data, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disc")
    disc = tmp_path / "small disc"
    disc.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disc], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let a disc be mounted")
    try:
        options = ("--save-interval-updates", "1", "--num-experts", "16", "--no-epoch-checkpoints")
        done = train(data, disc / "saved", *SPARSE, *options, check=False)
        [line] = [line for line in done.stderr.splitlines() if line.startswith("fairseq_hash: ")]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "cannot be written (No space left on device); earlier checkpoints are whole" in line
        check_folder(disc / "saved")
        assert list((disc / "saved").glob("checkpoint*.pt"))
    finally:
        subprocess.run(["umount", disc], check=True)


def check_folder(folder):
    """Check that every checkpoint is whole, and that nothing is there that does not belong to one."""
    assert fairseq_hash_command(["checkpoint", "verify", *map(str, folder.glob("*.pt"))]) == 0
    assert {path.name for path in (folder / "experts").iterdir()} == referenced(folder)
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.tmp"))


def test_what_fairseq_saves_at_a_crash_is_whole(data, tmp_path):
    """One process saves `crash.pt` where the gradients are not finite; it has its shards."""
    words = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--max-tokens", "48")
    trainer, epoch_itr = recorded.make_trainer(data, (*words, "--save-dir", str(tmp_path)))
    recorded.run(trainer, epoch_itr, 1)
    step = trainer.task.train_step
    trainer.task.train_step = lambda *given, **named: ruined(trainer, step(*given, **named))
    with pytest.raises(FloatingPointError):
        recorded.run(trainer, epoch_itr, 2)
    assert (tmp_path / "crash.pt").exists()
    check_folder(tmp_path)


def ruined(trainer, result):
    """Return a step's result after its gradients have become NaN."""
    for parameter in trainer.get_model().parameters():
        parameter.grad.fill_(float("nan"))
    return result
