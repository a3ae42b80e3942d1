"""Hash tables: builders against naive ones, properties, files."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_hash import hashing
from fairseq_hash.errors import UserError


def symbols(size):
    return [f"token{i}" for i in range(size)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 12))
def test_balanced_equals_naive_loop(counts, num_experts):
    counts = [*counts, 2]  # some information
    table = hashing.balanced_table(symbols(len(counts)), counts, num_experts)
    assert table.expert_VK.flatten().tolist() == reference.balanced_hash(counts, num_experts)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=300), st.integers(1, 16))
def test_balanced_load_is_within_the_greedy_bound(counts, num_experts):
    """Graham (1969): the largest load of descending greedy is at most 4/3 - 1/(3E) of the best possible one, which is
    at least the mean load and at least the largest count."""
    counts = [*counts, 2]
    table = hashing.balanced_table(symbols(len(counts)), counts, num_experts)
    load = torch.zeros(num_experts, dtype=torch.int64).index_add(0, table.expert_VK.flatten(), torch.tensor(counts))
    assert load.sum() == sum(counts)
    # The best possible is not known here; twice the larger of its two lower bounds holds for any list schedule.
    assert load.max() <= 2 * max(sum(counts) / num_experts, max(counts))


def test_balanced_is_even_on_zipf_counts():
    """A heavy-tailed vocabulary whose most frequent token is below the mean load comes out flat."""
    counts = [100_000 // (rank + 60) for rank in range(8000)]
    table = hashing.balanced_table(symbols(8000), counts, 16)
    load = torch.zeros(16, dtype=torch.int64).index_add(0, table.expert_VK.flatten(), torch.tensor(counts))
    assert load.max() / load.double().mean() < 1.001
    tokens = torch.bincount(table.expert_VK.flatten(), minlength=16)
    assert tokens.min() > 0


def test_unused_tokens_are_spread():
    """Tokens that never occur add no load; they still go to different experts."""
    table = hashing.balanced_table(symbols(102), [2, 2] + [0] * 100, 2)
    tokens = torch.bincount(table.expert_VK.flatten(), minlength=2)
    assert tokens.tolist() == [51, 51]


def test_splitmix64_against_published_outputs():
    """The first outputs for state 1234567, as published with the generator's reference implementations."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(4)]
    assert [reference.splitmix64(state) for state in states] == published
    ours = hashing._splitmix64(hashing.np.array(states, dtype=hashing.np.uint64))
    assert ours.tolist() == published


@given(st.integers(0, 2**40), st.integers(1, 200), st.integers(1, 70))
def test_random_equals_its_definition_in_python_integers(seed, size, num_experts):
    table = hashing.random_table(symbols(size), num_experts, seed)
    for token, expert in enumerate(table.expert_VK.flatten().tolist()):
        key = (token + (seed % 2**32 << 32)) % 2**64
        assert expert == reference.splitmix64(reference.splitmix64(key)) % num_experts


def test_random_is_uniform_and_seeds_are_independent():
    """Chi-squared of 64,000 draws over 64 cells: mean 63, standard deviation 11.2; five of them are 119."""
    experts = [hashing.random_table(symbols(64_000), 64, seed).expert_VK.flatten() for seed in (1, 2)]
    for table in experts:
        counts = torch.bincount(table, minlength=64).double()
        assert ((counts - 1000) ** 2 / 1000).sum() < 119
    # Two independent tables agree on 1 token in 64: 1000 of them, standard deviation 31.
    assert abs((experts[0] == experts[1]).sum().item() - 1000) < 160


def test_tables_do_not_depend_on_the_process():
    """Another process, with another hash seed for strings and another torch seed, builds the same tables."""
    program = (
        "import torch; torch.manual_seed(7); from fairseq_hash import hashing as h\n"
        "s = [f'token{i}' for i in range(500)]\n"
        "print(h.table_fingerprint(h.balanced_table(s, list(range(500)), 7).expert_VK))\n"
        "print(h.table_fingerprint(h.random_table(s, 7, 42).expert_VK), h.dictionary_fingerprint(s))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    )
    s = symbols(500)
    assert done.stdout.split() == [
        hashing.table_fingerprint(hashing.balanced_table(s, list(range(500)), 7).expert_VK),
        hashing.table_fingerprint(hashing.random_table(s, 7, 42).expert_VK),
        hashing.dictionary_fingerprint(s),
    ]


def test_importing_hashing_needs_no_fairseq():
    """With fairseq out of reach the module imports and builds a table."""
    program = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'fairseq': raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fairseq' else find(name, *a)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from fairseq_hash import hashing; hashing.random_table(['a', 'b'], 2, 0)\n"
        "assert 'fairseq' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@given(st.lists(st.text(max_size=5), unique=True, min_size=2, max_size=10))
def test_dictionary_fingerprint_tells_every_difference(words):
    fingerprint = hashing.dictionary_fingerprint(words)
    assert fingerprint == hashing.dictionary_fingerprint(list(words))
    shuffled = words[1:] + words[:1]
    assert fingerprint != hashing.dictionary_fingerprint(shuffled)
    # Words that only look the same when written after one another.
    assert fingerprint != hashing.dictionary_fingerprint([words[0] + words[1], *words[2:]])


def test_file_keeps_table_and_record(tmp_path):
    table = hashing.balanced_table(symbols(50), list(range(50)), 4)
    path = tmp_path / "a table.safetensors"
    hashing.save_table(table, path)
    loaded = hashing.load_table(path)
    assert torch.equal(loaded.expert_VK, table.expert_VK) and loaded.record == table.record
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = hashing.build_table(str(path), symbols(50), [1] * 50, 4, 0)
    assert torch.equal(again.expert_VK, table.expert_VK)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path):
    table = hashing.random_table(symbols(50), 4, 1)
    path = tmp_path / "table.safetensors"
    hashing.save_table(table, path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"", b"not a table", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or no table file") as error:
            hashing.load_table(path)
        assert "\n" not in str(error.value)
    from safetensors.torch import save_file

    save_file({"expert": table.expert_VK}, path)
    with pytest.raises(UserError, match="not a hash table of this package"):
        hashing.load_table(path)
    with pytest.raises(UserError, match="neither balanced, nor random"):
        hashing.load_table(tmp_path / "missing")


def test_wrong_tables_are_refused(tmp_path):
    table = hashing.random_table(symbols(50), 4, 1)
    path = tmp_path / "table.safetensors"
    hashing.save_table(table, path)
    with pytest.raises(UserError, match="another dictionary"):
        hashing.build_table(str(path), symbols(51), [2] * 51, 4, 0)
    with pytest.raises(UserError, match="built for 4 experts, but --num-experts is 8"):
        hashing.build_table(str(path), symbols(50), [2] * 50, 8, 0)
    for wrong, message in (
        (table.expert_VK + 1, "names expert 4"),
        (table.expert_VK - 1, "names expert -1"),
        (table.expert_VK.float(), "int64 of shape"),
        (table.expert_VK.flatten(), "int64 of shape"),
    ):
        with pytest.raises(UserError, match=message):
            replace(table, expert_VK=wrong)


@pytest.mark.parametrize("counts", [[0] * 5, [1] * 5, [1, 0, 1, 0, 1]])
def test_counts_without_information_are_refused(counts):
    with pytest.raises(UserError, match="no token counts"):
        hashing.balanced_table(symbols(5), counts, 2)


def test_wrong_counts_are_refused():
    with pytest.raises(UserError, match="4 counts for 5 symbols"):
        hashing.balanced_table(symbols(5), [2] * 4, 2)
    with pytest.raises(UserError, match="0 or more"):
        hashing.balanced_table(symbols(2), [2, -1], 2)


def test_many_tokens_with_random_counts_keep_every_token():
    """A vocabulary of WikiText-103's size: every token has an expert, loads are flat."""
    generator = random.Random(0)
    counts = [generator.randrange(1, 100) for _ in range(20_000)]
    table = hashing.balanced_table(symbols(20_000), counts, 128)
    load = torch.zeros(128, dtype=torch.int64).index_add(0, table.expert_VK.flatten(), torch.tensor(counts))
    assert table.expert_VK.shape == (20_000, 1) and load.max() - load.min() <= 1
