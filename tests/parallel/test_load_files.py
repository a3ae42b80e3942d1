"""Files of experts' loads: written and read again, and what is refused."""

import numpy as np
import pytest

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.load_files import read_loads, write_loads


def test_loads_come_back_as_they_were(tmp_path):
    loads = {1: np.array([5, 0, 7, 2]), 3: np.random.default_rng(0).random(4)}
    path = tmp_path / "loads.csv"
    write_loads(path, loads, np.array([0, 1, 1, 0]))
    assert path.read_text().splitlines()[:3] == ["layer,expert,load,rank", "1,0,5,0", "1,1,0,1"]
    found = read_loads(path, 4)
    assert list(found) == [1, 3] and all(np.array_equal(found[layer], loads[layer]) for layer in loads)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]))  # in any order
    assert list(read_loads(path, 4)) == [1, 3]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "is no file of loads: its first line must name layer, expert, load"),
        ("layer,load\n1,2\n", "its first line must name layer, expert, load"),
        ("layer,expert,load\n", "has no loads"),
        ("layer,expert,load\n1,0,3\n1,0,4\n", "has expert 0 of layer 1 twice"),
        ("layer,expert,load\n1,0,3\n", "has 1 experts in layer 1, this model has experts 0 to 1"),
        ("layer,expert,load\n1,0,3\n1,2,3\n", "has 2 experts in layer 1, this model has experts 0 to 1"),
        ("layer,expert,load\n1,0,0\n1,1,0\n", "has no load above 0 in layer 1"),
        ("layer,expert,load\n1,0,-2\n1,1,3\n", "line 2: the load -2.0 is out of range; give 0 or more"),
        ("layer,expert,load\n1,0,nan\n1,1,3\n", "line 2: the load nan is out of range"),
        ("layer,expert,load\n1,0,many\n", "line 2: layer and expert must be whole numbers, load a number"),
        ("layer,expert,load\n1,0\n", "line 2: layer and expert must be whole numbers, load a number"),
        (b"layer,expert,load\n1,\xff,3\n", "cannot read .* give a file that fairseq-hash plan --loads wrote"),
    ],
)
def test_what_is_no_file_of_loads_is_refused_in_one_line(tmp_path, content, line):
    path = tmp_path / "loads.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=line) as refused:
        read_loads(path, 2)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_loads(tmp_path / "loads.csv", 2)
