"""`fairseq-hash patches`: every override, as the registry has them."""

import json
from importlib import metadata

from called import call

from fairseq_hash.fairseq_patches import registry


def test_json_has_every_override():
    status, out, err = call("patches", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["fairseq"] == metadata.version("fairseq")
    expected = [(entry.module, entry.target, entry.reason) for entry in registry.overrides()]
    assert [(row["module"], row["target"], row["reason"]) for row in found["patches"]] == expected
    states = {row["target"]: row["source"] for row in found["patches"]}
    assert states["fairseq.trainer.Trainer.train_step"] == states["fairseq_cli.train.train"] == "known"
    assert states["torch.utils.data._utils.worker._worker_loop"] == "not fairseq's"


def test_a_changed_function_is_shown(monkeypatch):
    monkeypatch.setattr(
        "fairseq_hash.fairseq_patches.upstream.SOURCES", {"fairseq.trainer.Trainer.train_step": "0" * 16}
    )
    rows = json.loads(call("patches", "--json")[1])["patches"]
    assert {row["source"] for row in rows if row["target"] == "fairseq.trainer.Trainer.train_step"} == {"changed"}


def test_the_table_names_each_target_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = call("patches")
    assert status == 0
    for entry in registry.overrides():
        assert entry.module in out and entry.target in out
