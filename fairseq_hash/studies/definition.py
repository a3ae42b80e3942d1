"""What a study is: its models, its text, and the protocol by which they are compared. One YAML file defines it.

The protocol (`schedule.py` turns it into runs): each model's learning rate is tuned on a seed of its own, by the
perplexity on valid; the grid grows where its best rate is at an edge. Each model is then trained with every final seed,
and scored on test once.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import wrong_field
from fairseq_hash.core.yaml_text import check_yaml

FACTOR = 2.0  # between neighbours of a grid that grows
EMBEDDED = "embedded"  # the text that comes with Python
FOLDERS = ("data", "records")  # of the folder of work; a study has one of its own name beside them
# The most that a quick study does.
QUICK_TOKENS = {"train_tokens": 4096, "valid_tokens": 1024, "test_tokens": 2048}


@dataclass(frozen=True)
class StudyText:
    """The text of a study, of which every run sees each training token once.

    Attributes:
        name: what it is, such as "novels"; `embedded` is the documentation that Python brings.
        pieces: of the SentencePiece model, 256 of them bytes.
        train_tokens, valid_tokens, test_tokens: what is taken of each split, evenly over the text.
        made_as: what the text is for data_prep: "text" or "dialogue".
    """

    name: str
    pieces: int
    train_tokens: int
    valid_tokens: int
    test_tokens: int
    made_as: str = "text"


@dataclass(frozen=True)
class StudyModel:
    """One model of a study.

    Attributes:
        name: its name in the report.
        experiment: a configuration, such as `laptop/hash`.
        overrides: of the configuration, in Hydra's grammar.
        trained_as: another model, whose trainings this one shares; only the evaluation differs ("" for its own).
        options: options of the model that are changed for the evaluation, such as `base_evaluation: balanced`.
        table_of: the model from whose tuned run this one's hash table is made ("" for none).
        table: arguments of `fairseq-hash tables`, in which {checkpoint}, {data} and {out} stand for paths.
    """

    name: str
    experiment: str = ""
    overrides: tuple[str, ...] = ()
    trained_as: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    table_of: str = ""
    table: tuple[str, ...] = ()

    @property
    def evaluation(self) -> str:
        """What the evaluation changes, such as `base_evaluation=balanced`; `as trained` if nothing."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.options.items())) or "as trained"

    @property
    def family(self) -> "tuple[str, int] | None":
        """In a study of scaling, `Hash 16` is of the family `Hash` and has 16 experts; None without a number."""
        named = re.fullmatch(r"(.+) (\d{1,9})", self.name)
        return (named[1], int(named[2])) if named else None


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: that of its file.
        title: the heading of its report.
        question: what it asks.
        limits: what it cannot show.
        text: what the models are trained and scored on.
        baseline: the model to which the others' lead is drawn.
        models: the models by name, in the order of the report.
        learning_rates: the grid, ascending.
        grow: how many rates the grid may grow by on each side.
        tuning_seed: the seed of the trainings that choose a rate; no final seed.
        seeds: the seeds of the trainings that are compared.
        comparisons: pairs of models that answer the question, beside those with the baseline; the verdicts on them are
            adjusted for their number alone.
        margin: relative difference in perplexity below which two models are called equivalent, such as 0.01.
        validations: of each training, evenly over its updates.
        scaling: whether the models differ in their number of experts, so that a scaling form is fitted: to each family
            of models whose names differ in a number at their end only, such as `Hash 16` and `Hash 64`.
    """

    name: str
    title: str
    question: str
    limits: str
    text: StudyText
    baseline: str
    models: Mapping[str, StudyModel]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    comparisons: tuple[tuple[str, str], ...] = ()
    tuning_seed: int = 100
    grow: int = 3
    margin: float = 0.01
    validations: int = 6
    scaling: bool = False

    def trained(self) -> list[StudyModel]:
        """Return the models that have trainings of their own."""
        return [model for model in self.models.values() if not model.trained_as]

    def evaluations(self, name: str) -> dict[str, Mapping[str, Any]]:
        """Return the evaluations of a trained model, its own and those of models that share its trainings.

        They are named by what they change (`StudyModel.evaluation`), and have the options.
        """
        sharing = (model for model in self.models.values() if name in (model.name, model.trained_as))
        return {model.evaluation: model.options for model in sharing}


def load_study(path: Path) -> Study:
    """Read a study's file. With `extends: other`, it changes what `other.yaml` beside it says; null takes a model out.

    Raises:
        UserError: with one line, if the file or a value in it cannot be used.
    """
    given = _read(path, ())
    models = given.pop("models", None) or {}
    if not isinstance(models, dict):
        raise UserError(f"{path}: models is not a list of names with their settings; write NAME: {{experiment: ...}}")
    text = _filled(StudyText, _entries(given.pop("text", None) or {}, f"{path}: text"), f"{path}: text")
    named = {
        str(name): _filled(StudyModel, {"name": str(name), **_entries(of_model, where)}, where)
        for name, of_model in models.items()
        if of_model is not None and (where := f"{path}: model {name}")
    }
    comparisons = given.pop("comparisons", None) or []
    if not isinstance(comparisons, list) or not all(isinstance(pair, list) for pair in comparisons):
        raise UserError(f"{path}: comparisons is no list of pairs of models; write - [ONE, OTHER]")
    given["comparisons"] = [tuple(pair) for pair in comparisons]
    study = _filled(Study, {"name": path.stem, "text": text, "models": named, **given}, str(path))
    _check(study, str(path))
    return study


def quick(study: Study) -> Study:
    """Return the study as small as it can be and still do everything: for tests, and to see whether it runs."""
    text = study.text
    text = replace(text, **{key: min(getattr(text, key), most) for key, most in QUICK_TOKENS.items()})
    return replace(
        study,
        text=text,
        learning_rates=study.learning_rates[:2],
        grow=min(study.grow, 1),
        seeds=study.seeds[:2],
        validations=2,
    )


def _read(path: Path, extended: tuple[Path, ...]) -> dict[str, Any]:
    """Return the entries of a file, with those of the file that it extends; `extended` are the files that extend it."""
    try:
        check_yaml(path)
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise UserError(f"{path} is no list of entries with their values; write title: ... and so on")
        if "extends" in config:
            name = config.pop("extends")
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"{path} extends {name}; give the name of a study beside it")
            other = path.with_name(f"{name}.yaml")
            if not other.is_file() or other in (path, *extended):
                raise UserError(f"{path} extends {other.name}, which is not beside it or extends this one")
            config = OmegaConf.merge(OmegaConf.create(_read(other, (path, *extended))), config)
        return OmegaConf.to_container(config, resolve=True)
    except FileNotFoundError:
        raise UserError(f"there is no study {path}; give a YAML file, or the name of one in configs/studies") from None
    except UserError:
        raise
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _entries(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{where} is no list of entries with their values; write NAME: VALUE")
    return given


def _filled(kind: type, given: Mapping[str, Any], where: str) -> Any:
    """Return a dataclass of given values; lists become tuples."""
    known = {f.name: f for f in fields(kind)}
    if unknown := [key for key in given if key not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"; near: {near[0]}" if near else f"; there are {', '.join(known)}"
        raise UserError(f"{where} has no entry {unknown[0]}{hint}")
    needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"{where} lacks {missing[0]}; give it")
    made = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    if (wrong := wrong_field(made)) is not None:
        raise UserError(f"{where}: {wrong} is {getattr(made, wrong)}, which is not of its kind; see docs/studies.md")
    return made


def _check(study: Study, where: str) -> None:
    """Raise `UserError` for the first value that cannot be."""
    if study.name in FOLDERS:
        raise UserError(f"{where}: no study can be named {study.name}, as a folder of --work is; rename the file")
    text = study.text
    for name in ("pieces", *QUICK_TOKENS):
        if not isinstance(getattr(text, name), int) or getattr(text, name) < 1:
            raise UserError(f"{where}: text.{name} is {getattr(text, name)}; give a whole number of 1 or more")
    if text.made_as not in ("text", "dialogue"):
        raise UserError(f"{where}: text.made_as is {text.made_as}; give text or dialogue")
    rates = study.learning_rates
    if not rates or any(not isinstance(rate, (int, float)) or not 0 < rate < 1 for rate in rates):
        raise UserError(f"{where}: learning_rates are {list(rates)}; give one or more between 0 and 1")
    if list(rates) != sorted(set(rates)):
        raise UserError(f"{where}: learning_rates {list(rates)} do not ascend; sort them")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{where}: seeds are {list(study.seeds)}; give one or more, each once")
    if study.tuning_seed in study.seeds:
        raise UserError(f"{where}: tuning_seed {study.tuning_seed} is a final seed, too; choose on another one")
    if not 0 < study.margin < 1 or not 1 <= study.validations <= 100 or not 0 <= study.grow <= 10:
        raise UserError(f"{where}: margin is between 0 and 1, validations are 1 to 100, grow is 0 to 10")
    if study.baseline not in study.models:
        raise UserError(f"{where}: baseline {study.baseline} is none of its models: {', '.join(study.models)}")
    for number, pair in enumerate(study.comparisons):
        if len(pair) != 2 or len(set(pair) & set(study.models)) != 2:
            raise UserError(f"{where}: comparison {list(pair)} is no pair of its models; give [ONE, OTHER]")
        if set(pair) in map(set, study.comparisons[:number]):
            raise UserError(f"{where}: comparison {list(pair)} is there twice; give it once")
    folders: dict[str, str] = {}
    for model in study.models.values():
        at = f"{where}: model {model.name}"
        for other, own in ((model.trained_as, "trained_as"), (model.table_of, "table_of")):
            if other and (other not in study.models or study.models[other].trained_as):
                raise UserError(f"{at}: {own} names {other}, which is no model with trainings of its own")
        if bool(model.experiment) == bool(model.trained_as):
            raise UserError(f"{at} needs either experiment or trained_as")
        if model.trained_as and (model.overrides or model.table_of):
            raise UserError(f"{at} has the trainings of {model.trained_as}; only options can differ")
        if bool(model.table_of) != bool(model.table):
            raise UserError(f"{at}: table_of and table go together")
        if model.table_of and study.models[model.table_of].table_of:
            raise UserError(f"{at}: {model.table_of} has a made table itself; take one without")
        other_name = folders.setdefault(folder_name(model.name), model.name)
        if other_name != model.name:
            raise UserError(f"{at} and {other_name} would have one folder; name them differently")


def folder_name(model: str) -> str:
    """Return a model's name as that of a folder: `Hash, balanced` is `hash-balanced`."""
    return re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-") or "model"
