"""The runs of a sweep are what each of them is alone, also where one process does several."""

import pytest
from hydra_configs import logged, needs_current_hydra, write_configs
from plugin import command

pytestmark = needs_current_hydra

UPDATES = 6
VALIDATED = ("dataset.disable_validation=false", "dataset.validate_interval_updates=3")


def test_runs_that_share_a_process_are_as_runs_alone(data, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install '.[sweeps]'")
    chosen = (*write_configs(tmp_path, data, UPDATES), *VALIDATED)
    # Two processes for three runs, and the last one is the worst: it is not better than any before.
    rates = "optimization.lr=[0.01],[0.02],[0.0001]"
    command("hydra_train", "-m", *chosen, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", rates)
    alone = "hydra.run.dir=" + str(tmp_path / "alone")
    command("hydra_train", *chosen, "optimization.lr=[0.0001]", alone)
    runs = sorted((tmp_path / "runs").glob("*/seed*"))
    assert len(runs) == 3
    for run in runs:
        assert len(logged(run / "rank0.log")) == UPDATES
        assert (run / "checkpoint_best.pt").is_file()
        assert list(run.glob("board/train_inner/*")), "curves of its own"
    [last] = (run for run in runs if "0.0001" in str(run))
    assert logged(last / "rank0.log") == logged(tmp_path / "alone" / "rank0.log")
