"""Files and folders that options name: one line before work begins where they cannot be read or written."""

import argparse
import errno
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq import checkpoint_utils, options, utils
from plugin import USER_DIR, command, on_ranks, train, train_arguments

from fairseq_hash.checkpoint.mainfile import is_url, not_here
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.places import require_file, require_folder


def line_of(done):
    """Return the one line with which a command has ended, and check that there is nothing else of that kind."""
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said[-3000:]
    [line] = re.findall(r"^fairseq_hash: (.*)$", said, re.M)
    return line


def test_a_folder_is_made_and_left_empty(tmp_path):
    require_folder("--save-dir", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=f"^--save-dir {tmp_path}/file is a file; give a folder$"):
        require_folder("--save-dir", tmp_path / "file")
    with pytest.raises(UserError, match=r"/file/below cannot be written \(Not a directory\); give a folder that you"):
        require_folder("--save-dir", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disc_that_takes_nothing(tmp_path, monkeypatch, number):
    """Whatever the system says; root, whom these tests may run as, may write anywhere."""

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=re.escape(f"--save-dir {tmp_path} cannot be written ({os.strerror(number)});")):
        require_folder("--save-dir", tmp_path)


def test_a_file_to_append_to(tmp_path):
    (tmp_path / "log").write_text("before")
    require_file("--log-file", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "before"
    for path in (tmp_path, tmp_path / "no" / "log"):
        with pytest.raises(UserError, match=f"^--log-file {path} cannot be written "):
            require_file("--log-file", path)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://a.b/c.pt", "https://a.b/c.pt"),
        (Path("s3://bucket/c.pt"), "s3://bucket/c.pt"),
        ("runs/c.pt", None),
        ("/runs/a:b/c.pt", None),
        ("a:b.pt", None),
    ],
)
def test_an_address_is_shown_as_it_was_given(path, shown):
    assert is_url(path) == (shown is not None)
    assert not_here(path).startswith(f"{shown} is no file of this" if shown else f"{path} does not exist")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("--save-dir", "{file}"), "--save-dir {file} is a file; give a folder"),
        (("--save-dir", "s3://bucket/runs"), "--save-dir s3://bucket/runs is no folder of this machine"),
        (("--log-file", "{file}/log"), "--log-file {file}/log cannot be written (Not a directory)"),
        (("--tensorboard-logdir", "{file}"), "--tensorboard-logdir {file} is a file; give a folder"),
        (("--restore-file", "https://a.b/c.pt"), "--restore-file https://a.b/c.pt is no file of this machine"),
        (("--finetune-from-model", "s3://a/c.pt"), "--finetune-from-model s3://a/c.pt is no file of this machine"),
        (("--from-dense", "https://a.b/c.pt"), "--from-dense https://a.b/c.pt is no file of this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_training_looks_first(data, tmp_path, given, line):
    (tmp_path / "file").touch()
    given = [word.format(file=tmp_path / "file") for word in given]
    done = train(data, tmp_path / "runs", "--router", "hash", "--num-experts", "4", *given, check=False)
    assert line_of(done).startswith(line.format(file=tmp_path / "file"))
    assert "model_record" not in done.stdout + done.stderr


def test_a_training_without_a_batch_size(data, tmp_path):
    given = train_arguments(data, tmp_path)
    del given[given.index("--max-tokens") : given.index("--max-tokens") + 2]
    assert line_of(command("train", *given, check=False)).endswith("--max-tokens N, or --batch-size N")


def test_several_ranks_end_where_rank_0_cannot_write(data, tmp_path):
    (tmp_path / "file").touch()
    given = train_arguments(data, tmp_path / "file", "--router", "hash")
    done = on_ranks(2, "-m", "fairseq_cli.train", *given)
    said = "".join(rank.stdout + rank.stderr for rank in done)
    [line] = re.findall("^fairseq_hash: (.*)$", said, re.M)
    assert line == f"rank 0: --save-dir {tmp_path}/file is a file; give a folder"
    assert [rank.returncode for rank in done] == [1, 1]


@pytest.mark.parametrize("name", ["eval_lm", "generate", "interactive", "validate"])
def test_a_model_that_is_not_there(data, tmp_path, name):
    more = ("--tokens-per-sample", "16") if name == "eval_lm" else ("--task", "language_modeling", "--max-tokens", "64")
    given = (data, "--user-dir", USER_DIR, "--cpu", *more)
    none, missing = (command(name, *given, *path, check=False) for path in ((), ("--path", tmp_path / "no.pt")))
    assert line_of(none).startswith("--path is missing; give the checkpoint, such as ")
    assert line_of(missing) == f"--path {tmp_path}/no.pt does not exist"


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_best.pt").touch()
    for path, line in (
        (tmp_path / "empty.pt", r"empty.pt is damaged or no checkpoint \(it ends too early\); use another checkpoint"),
        (tmp_path, f"{tmp_path} is a folder; give the file of a checkpoint"),
        (tmp_path / "run", f"is a folder; give the file of a checkpoint, such as {tmp_path}/run/checkpoint_best.pt"),
        ("https://a.b/c.pt", "--path https://a.b/c.pt is no file of this machine"),
    ):
        with pytest.raises(SystemExit, match=line):
            checkpoint_utils.load_model_ensemble_and_task([str(path)])


def test_a_parser_without_a_path_serves_programs(data):
    """Those that make options of their own words: only the command line has to name a model."""
    parser = options.get_eval_lm_parser()
    assert options.parse_args_and_arch(parser, [str(data)]).path is None


def test_this_package_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path(USER_DIR)
    link = tmp_path / "link" / own.name
    link.parent.mkdir()
    link.symlink_to(own)
    before = sys.path.copy()
    for name in (own.name, own, f"{own}/", link):
        utils.import_user_module(argparse.Namespace(user_dir=str(name)))
    assert sys.path == before
    copy = tmp_path / "copy" / own.name
    copy.mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"--user-dir {copy} is another copy than {own}, which is imported already"):
        utils.import_user_module(SimpleNamespace(user_dir=str(copy)))
    with pytest.raises(SystemExit, match=f"--user-dir no/fairseq_hash does not exist; fairseq_hash is in {own}"):
        utils.import_user_module(SimpleNamespace(user_dir="no/fairseq_hash"))


def test_other_user_modules_are_imported_as_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "another_module").mkdir()
    (tmp_path / "another_module" / "__init__.py").write_text("value = 3\n")
    utils.import_user_module(SimpleNamespace(user_dir=str(tmp_path / "another_module")))
    assert sys.modules.pop("another_module").value == 3
    shutil.rmtree(tmp_path / "another_module")
    # fairseq's own traceback, or one line from the fairseq that scripts/build_fairseq.py makes
    with pytest.raises((FileNotFoundError, SystemExit), match="a_third_module"):
        utils.import_user_module(SimpleNamespace(user_dir=str(tmp_path / "a_third_module")))
