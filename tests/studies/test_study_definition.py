"""A study's file: what it says, and what it may not say."""

import pytest
import yaml

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.studies.definition import QUICK_TOKENS, folder_name, load_study, quick

STUDY = {
    "title": "Two models",
    "question": "Which is better?",
    "limits": "One text.",
    "text": {"name": "embedded", "pieces": 400, "train_tokens": 8192, "valid_tokens": 2048, "test_tokens": 2048},
    "baseline": "Dense",
    "learning_rates": [0.001, 0.002],
    "seeds": [1, 2, 3],
    "models": {
        "Dense": {"experiment": "laptop/dense"},
        "BASE": {"experiment": "laptop/base", "overrides": ["model.num_experts=4"]},
        "BASE, balanced": {"trained_as": "BASE", "options": {"base_evaluation": "balanced"}},
    },
}


def written(folder, name="two", **changes):
    path = folder / f"{name}.yaml"
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_file_becomes_a_study(tmp_path):
    study = load_study(written(tmp_path))
    assert study.name == "two" and study.learning_rates == (0.001, 0.002) and study.seeds == (1, 2, 3)
    assert list(study.models) == ["Dense", "BASE", "BASE, balanced"]
    assert [model.name for model in study.trained()] == ["Dense", "BASE"]
    assert study.models["BASE"].overrides == ("model.num_experts=4",)
    assert study.evaluations("BASE") == {"as trained": {}, "base_evaluation=balanced": {"base_evaluation": "balanced"}}
    assert study.evaluations("Dense") == {"as trained": {}}


def test_study_extends_another(tmp_path):
    written(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text(
        yaml.safe_dump(
            {
                "extends": "two",
                "title": "On other text",
                "text": {"name": "dialogue"},
                "models": {"BASE, balanced": None, "Hash": {"experiment": "laptop/hash"}},
            }
        )
    )
    study = load_study(other)
    assert study.name == "other" and study.title == "On other text" and study.text.name == "dialogue"
    assert study.text.pieces == 400 and list(study.models) == ["Dense", "BASE", "Hash"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"titel": "x"}, "no entry titel; near: title"),
        ({"question": None}, "lacks question"),
        ({"learning_rates": []}, "learning_rates are []"),
        ({"learning_rates": [0.002, 0.001]}, "do not ascend"),
        ({"learning_rates": [2.0]}, "give one or more between 0 and 1"),
        ({"seeds": [1, 1]}, "each once"),
        ({"tuning_seed": 2}, "is a final seed, too"),
        ({"baseline": "Denes"}, "is none of its models: Dense, BASE"),
        ({"comparisons": 3}, "comparisons is no list of pairs"),
        ({"comparisons": ["Dense"]}, "comparisons is no list of pairs"),
        ({"comparisons": [["Dense", "Dense"]]}, "comparison ['Dense', 'Dense'] is no pair of its models"),
        ({"comparisons": [["Dense", "Mixtral"]]}, "is no pair of its models; give [ONE, OTHER]"),
        ({"comparisons": [["Dense", "BASE"], ["BASE", "Dense"]]}, "comparison ['BASE', 'Dense'] is there twice"),
        ({"margin": 2}, "margin is between 0 and 1"),
        ({"text": {**STUDY["text"], "pieces": 0}}, "text.pieces is 0"),
        ({"text": {**STUDY["text"], "made_as": "poem"}}, "give text or dialogue"),
        ({"models": {"Dense": {}}}, "needs either experiment or trained_as"),
        ({"models": {"Dense": {"experiment": "a/b", "seed": 1}}}, "model Dense has no entry seed"),
        ({"models": {**STUDY["models"], "X": {"trained_as": "Y"}}}, "trained_as names Y"),
        ({"models": {**STUDY["models"], "X": {"trained_as": "BASE", "overrides": ["a=1"]}}}, "only options can differ"),
        ({"models": {**STUDY["models"], "X": {"experiment": "a/b", "table_of": "Dense"}}}, "go together"),
        ({"models": {**STUDY["models"], "dense": {"experiment": "a/b"}}}, "would have one folder"),
    ],
)
def test_value_that_cannot_be_is_one_line(tmp_path, changes, words):
    with pytest.raises(UserError) as refusal:
        load_study(written(tmp_path, **changes))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["data", "records"])
def test_study_does_not_take_the_name_of_a_folder(tmp_path, name):
    path = written(tmp_path).rename(tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match=f"no study can be named {name}"):
        load_study(path)


@pytest.mark.parametrize("text", ["models: [", "just words", "\x00"])
def test_no_study_is_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_study(path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="there is no study"):
        load_study(tmp_path / "none.yaml")


def test_quick_study_is_small(tmp_path):
    small = quick(load_study(written(tmp_path)))
    assert {key: getattr(small.text, key) for key in QUICK_TOKENS} == QUICK_TOKENS
    assert small.learning_rates == (0.001, 0.002) and small.seeds == (1, 2)


def test_name_of_a_folder_needs_no_quotes():
    assert folder_name("BASE, balanced evaluation (E=16)") == "base-balanced-evaluation-e-16-"[:-1]


def test_every_study_of_the_project_is_whole():
    paths = sorted((own_configs() / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_study(path).name == path.stem


@pytest.mark.parametrize("path", sorted((own_configs() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_models_of_every_study_compose(path):
    for model in load_study(path).trained():
        if model.overrides:
            compose(own_configs(), model.experiment, [*model.overrides, "task.data=data", "experiment.vocabulary=400"])
