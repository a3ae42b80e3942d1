"""--model-overrides: what names an option acts, and what names none is refused."""

from pathlib import Path

import pytest
from fairseq import checkpoint_utils, hub_utils
from omegaconf import OmegaConf, open_dict
from plugin import USER_DIR, build, command, train

HASH = ("--router", "hash", "--sparse-layers", "1", "--num-experts", "4")


def saved(data):
    """The configuration that a checkpoint of a small model has, as fairseq reads it."""
    config = OmegaConf.create(OmegaConf.to_container(build(data, *HASH)[0], enum_to_str=True))
    OmegaConf.set_struct(config, True)
    return config


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"map_expert": True}, "map_expert is no option of this checkpoint; near: map_experts"),
        (
            {"data": "x", "token_per_sample": 9},
            "token_per_sample is no option of this checkpoint; near: tokens_per_sample",
        ),
        ({"colour": 1}, "colour is no option of this checkpoint; it has the options of its training"),
    ],
)
def test_what_is_no_option_is_refused(data, overrides, line):
    config = saved(data)
    before = OmegaConf.to_container(config)
    with pytest.raises(SystemExit, match=f"fairseq_hash: --model-overrides: {line}"):
        checkpoint_utils.overwrite_args_by_name(config, overrides)
    assert OmegaConf.to_container(config) == before


def test_what_is_an_option_acts(data):
    """Of any group, by its name or by its group's; one that is newer than the checkpoint, too."""
    config = saved(data)
    with open_dict(config):
        del config.model["map_experts"]  # as in a checkpoint that was saved before there was such an option
    given = {"map_experts": True, "data": "elsewhere", "seed": 7, "model": {"num_experts": 8}}
    checkpoint_utils.overwrite_args_by_name(config, {name: given[name] for name in ("map_experts", "data", "seed")})
    assert (config.model.map_experts, config.task.data, config.common.seed) == (True, "elsewhere", 7)
    checkpoint_utils.overwrite_args_by_name(config, {"model": given["model"]})
    assert config.model.num_experts == 8 and config.model.router == "hash"


def test_the_hub_gives_what_it_likes(data, monkeypatch):
    """Keys of tokenizers, which are no options of a model."""
    config = saved(data)

    def load(paths, arg_overrides):
        checkpoint_utils.overwrite_args_by_name(config, arg_overrides)
        return [], config, None

    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble_and_task", load)
    hub_utils.from_pretrained(str(Path(data).parent), "model.pt", str(data), sentencepiece_model="x", colour=1)
    assert config.task.data == str(data)
    with pytest.raises(SystemExit, match="colour is no option"):  # and nobody else does, after it
        checkpoint_utils.overwrite_args_by_name(config, {"colour": 1})


def test_by_the_commands(data, tmp_path):
    """Evaluation ends in one line; validation gives all options of its command as overrides, which are known."""
    train(data, tmp_path, *HASH, "--max-update", "1", "--disable-validation")
    options = ("--path", tmp_path / "checkpoint_last.pt", "--user-dir", USER_DIR, "--cpu", "--max-tokens", "256")
    wrong = ("--model-overrides", "{'hash_tabel': 'random'}")
    evaluation = ("eval_lm", data, *options, "--gen-subset", "valid", "--tokens-per-sample", "16")
    validation = ("validate", data, *options, "--valid-subset", "valid", "--task", "language_modeling", "--seed", "3")
    for words in (evaluation, validation):
        done = command(*words, *wrong, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        line = "fairseq_hash: --model-overrides: hash_tabel is no option of this checkpoint; near: hash_table"
        assert last.startswith(line)
    command(*validation, "--no-progress-bar")
