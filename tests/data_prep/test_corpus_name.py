"""The name of a corpus: from the command line into the data's record, and from there into the record of a model."""

import json
import logging
import re

import plugin
import pytest
from one_process import one_process
from prepared import arguments, write_text

from data_prep.cli import main
from fairseq_hash.provenance import corpus_of


@pytest.mark.parametrize(("words", "name"), [((), "text"), (("--corpus", "Reddit, of 2019"), "Reddit, of 2019")])
def test_the_name_goes_from_the_data_to_the_model(tmp_path, words, name, caplog):
    data = tmp_path / "data"
    with one_process():
        assert main(arguments(write_text(tmp_path / "text"), data, "--words", *words)) == 0
    assert corpus_of(data) == name
    with caplog.at_level(logging.INFO, logger="fairseq_hash.model"):
        plugin.build(data)
    (record,) = (re.search(r"model_record \| (\{.*\})", line)[1] for line in caplog.messages if "model_record" in line)
    assert json.loads(record)["corpus"] == name


def test_a_part_is_not_the_corpus(tmp_path):
    data, part = tmp_path / "data", tmp_path / "part"
    with one_process():
        assert main(arguments(write_text(tmp_path / "text"), data, "--words", "--corpus", "Reddit")) == 0
    assert main(["cut", str(data), "--train-tokens", "100", "--out", str(part)]) == 0
    assert corpus_of(part) == "cut"


@pytest.mark.parametrize("record", [None, "", "[]", '{"identity": null}', '{"identity": {}}'])
def test_without_a_record_the_corpus_has_no_name(tmp_path, record):
    if record is not None:
        (tmp_path / "provenance.json").write_text(record)
    assert corpus_of(tmp_path) is None
