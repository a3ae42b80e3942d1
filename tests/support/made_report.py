"""Results of the made study, and what tests of its report read them with."""

import io

import numpy as np
import pandas as pd
from made_study import SEEDS, made_facts, made_runs_of_study, made_study
from scipy import stats

from fairseq_hash.studies.leads import lead_verdicts
from fairseq_hash.studies.parts import parts_of
from fairseq_hash.studies.records import FINAL
from fairseq_hash.studies.results import gather


def results_of(done=None, trigram=4.6, **changes):
    return gather(made_study(**changes), made_facts(trigram), made_runs_of_study() if done is None else done)


def by_heading(results):
    return {part.heading: part for part in parts_of(results, lead_verdicts(results))}


def without(done, *, model, stage=FINAL, seeds=SEEDS):
    return {run: one for run, one in done.items() if (run.model, run.stage) != (model, stage) or run.seed not in seeds}


def read_csv(content):
    return pd.read_csv(io.BytesIO(content))


def by_scipy(values):
    """Return the mean and the ends of Student's interval."""
    return np.mean(values), *stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
