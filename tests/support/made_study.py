"""A study with made records: every number in it is known, and no model was trained."""

import numpy as np

from fairseq_hash.studies.definition import Study, StudyModel, StudyText
from fairseq_hash.studies.records import FINAL, RunRecord, Scores, TextFacts, Validation
from fairseq_hash.studies.schedule import Run, tuning_run

SEEDS, RATES = (1, 2, 3), (0.001, 0.002, 0.004)
FREQUENCY_TOKENS, DOCUMENT_TOKENS = [0, 100, 400, 500], [300, 100, 200, 250, 150]
POSITIONS = 16
TOKENS, BYTES = 1000, 3500
VALIDATIONS = 4  # at each quarter of the training
# Mean nats of test: one value a seed. Hash is better than Dense, Twin equal but for noise, Switch undecided.
NATS = {
    "Dense": (4.50, 4.52, 4.54),
    "Hash": (4.40, 4.425, 4.44),
    "Twin": (4.501, 4.5205, 4.5412),
    "Switch": (4.40, 4.60, 4.50),
    "Hash, balanced": (4.41, 4.435, 4.45),
}
LEAD_NATS = (0.16, 0.14, 0.12, 0.10)  # of Hash on valid, at each validation
EVALUATIONS = {"Hash, balanced": "base_evaluation=balanced"}  # of the models that are not scored as trained
EXPERTS = {"Dense": 0, "Hash": 16, "Twin": 0, "Switch": 16}
ORIGIN = {"fairseq_hash": "0.1.0", "commit": "abc123", "python": "3.12", "torch": "2.11", "processor": "A processor"}
ORIGIN |= {"cores": 2, "gpus": [], "platform": "Linux", "date": "2026-11-20T10:00:00+00:00"}


def made_study(**changes):
    """Return a study of a dense model, three others, and one that shares the trainings of Hash."""
    models = {name: StudyModel(name, experiment=f"laptop/{name.lower()}") for name in EXPERTS}
    models["Hash, balanced"] = StudyModel("Hash, balanced", trained_as="Hash", options={"base_evaluation": "balanced"})
    given = {
        "name": "made",
        "title": "A made study",
        "question": "Does it report?",
        "limits": "These numbers are made.",
        "text": StudyText("novels", 4096, 40_000, 1000, TOKENS),
        "baseline": "Dense",
        "models": models,
        "learning_rates": RATES,
        "seeds": SEEDS,
        "grow": 0,
        "validations": VALIDATIONS,
    }
    return Study(**given | changes)


def made_facts(trigram=4.6):
    """Return the facts of a text of 1000 tokens of test in 5 documents; `trigram` is its nats per token."""
    ngrams = {"1": 6.0, "2": 5.0, "3": trigram}
    return TextFacts(
        name="novels",
        pieces=4096,
        fingerprint="f00d",
        tokens={"train": 40_000, "valid": 1000, "test": TOKENS},
        bytes={"train": 140_000, "valid": 3500, "test": BYTES},
        document_kind="documents",
        document_tokens=DOCUMENT_TOKENS,
        frequency_labels=["0", "1-9", "10-99", "100+"],
        frequency_tokens=FREQUENCY_TOKENS,
        tokens_per_sample=POSITIONS,
        ngrams={"valid": ngrams, "test": ngrams},
        ngram_frequency_nats={"3": [0.0, 100 * 9.0, 400 * 5.0, 500 * 3.0]},
    )


def made_scores(nats):
    """Return scores with a given mean: position p has nats + 1 / (p + 1), a range of counts nats + its number."""
    tokens = np.full(POSITIONS, TOKENS // POSITIONS)
    of_positions = tokens * (nats + 1 / np.arange(1, POSITIONS + 1))
    of_ranges = FREQUENCY_TOKENS * (nats + np.arange(4))
    of_documents = np.array(DOCUMENT_TOKENS) * (nats + np.array([0.1, -0.1, 0.0, 0.2, -0.3]))
    return Scores(nats, of_positions.tolist(), tokens.tolist(), of_ranges.tolist(), of_documents.tolist())


def made_record(run, valid, test=None, diverged="", **changes):
    """Return the record of a run with nats at its validations, and nats on test by the names of models."""
    experts = EXPERTS[run.model]
    points = [
        Validation(40_000 * part // len(valid), 60.0 * part, nats) for part, nats in enumerate(valid, 1) if not diverged
    ]
    given = {
        "identity": f"{run.model} {run.learning_rate} {run.seed} {run.stage}",
        "model": run.model,
        "experiment": [f"laptop/{run.model.lower()}"],
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "parameters": 3_000_000 if experts else 1_000_000,
        "active": 1_000_000,
        "experts": experts,
        "flops_per_token": 6e6,
        "tokens": 40_000,
        "seconds": 250.0,
        "tokens_per_second": 1000.0 + run.seed,
        "validations": points,
        "diverged": diverged,
        "load_max": 1.5 + run.seed / 10 if experts else None,
        "dropped": 0.01 * run.seed if experts else None,
        "test": {EVALUATIONS.get(name, "as trained"): made_scores(nats) for name, nats in (test or {}).items()},
        "provenance": {**ORIGIN, "date": f"2026-11-2{run.seed % 10}T10:00:00+00:00"},
    }
    return RunRecord(**given | changes)


def made_runs_of_study():
    """Return all runs: Dense's best rate is in the middle, Hash's at the edge, and Switch diverges at the highest."""
    done = {}
    tuning = {"Dense": (4.7, 4.6, 4.8), "Hash": (4.7, 4.6, 4.55), "Twin": (4.7, 4.6, 4.8), "Switch": (4.7, 4.6, None)}
    best = {"Dense": 0.002, "Hash": 0.004, "Twin": 0.002, "Switch": 0.002}
    for model, losses in tuning.items():
        for rate, loss in zip(RATES, losses, strict=True):
            run = tuning_run(made_study(), model, rate)
            why = "" if loss else "loss is nan at update 7"
            done[run] = made_record(run, [loss] * VALIDATIONS, diverged=why)
        for number, seed in enumerate(SEEDS):
            run = Run(model, best[model], seed, FINAL)
            test = {name: NATS[name][number] for name in NATS if name.partition(",")[0] == model}
            done[run] = made_record(run, valid_curve(model, number), test)
    return done


def valid_curve(model, number):
    """Return nats at the validations of a final run; Hash's lead over Dense is LEAD_NATS and some noise by seed."""
    dense = np.array([5.5, 5.0, 4.8, 4.6]) + 0.02 * number
    if model == "Hash":
        return list(dense - LEAD_NATS + 0.001 * number)
    return list(dense + {"Dense": 0.0, "Twin": 0.001, "Switch": 0.05 * (number - 1)}[model])
