"""Reading ahead of mapped experts: what is read, how much is held, how it fails, and that results stay."""

import gc
import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe import read_ahead
from fairseq_hash.moe.experts import ExpertFeedForward, ExpertStack, GatedFeedForward
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.read_ahead import ReadAhead

D, F, E = 6, 8, 4
PAGE = os.sysconf("SC_PAGE_SIZE")
BUILD = {
    "plain": lambda: ExpertFeedForward(range(E), D, F, torch.relu, 0.0, (0,)),
    "segments": lambda: ExpertFeedForward(range(E), D, F, torch.relu, 0.0, (0,), segments=2),
    "gated": lambda: GatedFeedForward(range(E), D, F, 0.0, 0.0, (0,)),
    "stack": lambda: ExpertStack(range(E), 2, D, F, torch.relu, 0.0, 0),
}


class Saved:
    """Stands for a parameter in several shards."""

    def __init__(self, parts):
        self.parts = parts

    def verify(self):
        pass


def mapped(build, experts, ends=()):
    """Return experts that lie in the tensors of others, cut after the experts `ends`."""
    with torch.device("meta"):
        shell = MappedExperts(build())
    for name, parameter in experts.named_parameters():
        parts = parameter.detach().tensor_split(ends)
        shell.leave_in_file(name, Saved(parts) if ends else parts[0])
    return shell


def mapped_file(path, pages):
    """Return a mapped file of random bytes, `[pages, PAGE]`."""
    path.write_bytes(os.urandom(pages * PAGE))
    storage = torch.UntypedStorage.from_file(str(path), False, pages * PAGE)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(pages, PAGE)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_results_are_those_in_memory_to_the_bit(data):
    """Of several layers in one and several shards, whatever was read ahead: all, what serves, too little, nothing."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    build = BUILD[data.draw(st.sampled_from(sorted(BUILD)))]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))  # the second is converted
    layers, expected = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        experts = build().eval()
        groups = E * getattr(experts, "segments", 1)
        sizes = data.draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups))
        rows_RD = torch.randn(sum(sizes), D, dtype=dtype)
        ends = data.draw(st.sampled_from([(), (2,), (1, 3)]))
        ahead = data.draw(st.lists(st.integers(0, E - 1), unique=True))
        layers.append((mapped(build, experts, ends), ahead, rows_RD, sizes))
        with torch.no_grad():
            expected.append(experts.to(dtype)(rows_RD, sizes))
        experts.to(torch.float32)
    of_expert = sum(row.nbytes for row in layers[0][0].in_file([0]))
    chunk, held = data.draw(st.integers(1, 5 * of_expert)), data.draw(st.integers(0, 20 * of_expert))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "CHUNK", chunk)
        patch.setattr(read_ahead, "HELD", held)
        reader = ReadAhead([(experts, ahead) for experts, ahead, _, _ in layers])
        for (experts, _, rows_RD, sizes), y_RD in zip(layers, expected, strict=True):
            assert torch.equal(reader.run(experts, rows_RD, sizes), y_RD)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2000))
def test_chunks_are_all_experts_in_order_as_many_as_fit(most):
    shell = mapped(BUILD["plain"], BUILD["plain"]().eval())
    size = 4 * (2 * D * F + D + F)
    chunks = shell.chunks(most)
    assert [expert for chunk in chunks for expert in chunk] == list(range(E))
    assert all(len(chunk) == min(E, max(1, most // size)) for chunk in chunks[:-1])
    assert all(len(chunk) * size <= max(most, size) for chunk in chunks)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, E * 2 - 1)))
def test_only_experts_that_serve_are_read_or_copied(groups):
    """In two segments of an expert, in two shards, and in another dtype: the rest may hold anything."""
    experts = BUILD["segments"]().eval()
    sizes = [groups.count(group) for group in range(E * 2)]
    serving = sorted({group // 2 for group in groups})
    shell = mapped(BUILD["segments"], experts, (1,))
    assert shell.serving(sizes) == serving
    rows = shell.in_file(serving)
    expected = [row for parameter in experts.parameters() for row in parameter[serving]]
    assert len(rows) == len(expected) and all(map(torch.equal, rows, expected))
    start = {part.data_ptr() for parameter in experts.parameters() for part in parameter}
    assert {row.data_ptr() for row in rows} <= start  # not a copy


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5 * PAGE), st.integers(1, 2 * PAGE)), max_size=6))
def test_pages_are_those_of_the_rows_each_once(places):
    memory = torch.zeros(8 * PAGE, dtype=torch.uint8)
    rows = [memory[start : start + length] for start, length in places]
    first = memory.data_ptr()
    expected = {(first + byte) // PAGE for start, length in places for byte in range(start, start + length)}
    runs = [range(start // PAGE, (start + length) // PAGE) for start, length in read_ahead._pages(rows)]
    found = [page for run in runs for page in run]
    assert sorted(found) == sorted(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked to read ahead")
def test_what_was_read_is_in_memory_and_a_cut_file_is_one_line(tmp_path):
    pages_NP = mapped_file(tmp_path / "x", 64)
    read_ahead.read([pages_NP[10:20], pages_NP[40:41]])
    with open("/proc/self/smaps") as maps:
        lines = iter(maps.read().splitlines())
    after = next(line for line in lines if line.endswith(str(tmp_path / "x")))
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert after and resident * 1024 >= 11 * PAGE
    os.truncate(tmp_path / "x", 32 * PAGE)
    read_ahead.read([pages_NP[10:20]])
    with pytest.raises(UserError, match="cannot be read from the checkpoint's files any more"):
        read_ahead.read([pages_NP[30:34]])


def test_a_file_whose_name_goes_stays_readable(tmp_path):
    pages_NP = mapped_file(tmp_path / "x", 4)
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").unlink()
    read_ahead.read([pages_NP])
    assert bytes(pages_NP.flatten().tolist()) == content


def layers_of_one(count):
    """Return layers, and what to run them with."""
    shells = [mapped(BUILD["plain"], BUILD["plain"]().eval()) for _ in range(count)]
    return shells, torch.randn(E, D), (1,) * E


@pytest.mark.parametrize(("of_chunk", "held", "most"), [(1, 0, 2), (1, 3, 3), (2, 4, 2), (4, 1, 2), (4, 100, 7)])
def test_what_is_held_is_bounded(monkeypatch, of_chunk, held, most):
    """Counted when a read begins: chunks that are read or were, and are not done with. `held` counts experts."""
    begun, over, counts, threads = [], [], [], set()

    def count(rows):
        if rows:  # nothing was left to read when the chunk ran
            begun.append(rows)
            counts.append(len(begun) - len(over))
            threads.add(threading.current_thread().name)

    size = 4 * (2 * D * F + D + F)
    monkeypatch.setattr(read_ahead, "CHUNK", of_chunk * size)
    monkeypatch.setattr(read_ahead, "HELD", held * size)
    monkeypatch.setattr(read_ahead, "read", count)
    shells, rows_RD, sizes = layers_of_one(7)
    reader = ReadAhead([(experts, range(E)) for experts in shells])
    assert len(reader._begun) == most
    forward = MappedExperts.forward
    monkeypatch.setattr(MappedExperts, "forward", lambda *given: over.append(given) or forward(*given))
    for experts in shells:
        reader.run(experts, rows_RD, sizes)
    assert len(begun) == 7 * E // of_chunk and max(counts) <= most
    assert threads == {"read-ahead_0"}  # all were read ahead


def test_experts_without_a_checkpoint_are_refused():
    with torch.device("meta"):
        shell = MappedExperts(BUILD["plain"]())
    with pytest.raises(UserError, match="need a checkpoint"):
        ReadAhead([(shell, range(E))])
    with pytest.raises(UserError, match="need a checkpoint"):
        ReadAhead([]).run(shell, torch.randn(E, D), (1,) * E)


def test_a_layer_that_nobody_announced_is_read_when_it_runs():
    experts = BUILD["plain"]().eval()
    shell, rows_RD = mapped(BUILD["plain"], experts), torch.randn(E, D)
    with torch.no_grad():
        assert torch.equal(ReadAhead([]).run(shell, rows_RD, (1,) * E), experts(rows_RD, (1,) * E))


def test_what_was_not_read_ahead_is_read_when_the_layer_runs(monkeypatch):
    """And what was let go of is what served."""
    given, let_go = [], []
    monkeypatch.setattr(read_ahead, "read", given.append)
    monkeypatch.setattr(read_ahead, "let_go", let_go.append)
    [experts], rows_RD, _ = layers_of_one(1)
    ReadAhead([(experts, [1, 3])]).run(experts, rows_RD, (1, 2, 0, 1))
    assert [[row.data_ptr() for row in rows] for rows in (*given, *let_go)] == [
        [row.data_ptr() for row in experts.in_file(which)] for which in ([1, 3], [0], [0, 1, 3])
    ]


def test_an_error_of_the_reader_reaches_the_layer_that_waits(monkeypatch):
    """And no later call hangs."""

    def fail(rows):
        raise UserError("the disk is gone")

    shells, rows_RD, sizes = layers_of_one(4)
    monkeypatch.setattr(read_ahead, "read", fail)
    reader = ReadAhead([(experts, range(E)) for experts in shells])
    for experts in shells[:2]:
        with pytest.raises(UserError, match="the disk is gone"):
            reader.run(experts, rows_RD, sizes)


def test_the_thread_ends_with_its_reader():
    shells, _, _ = layers_of_one(3)
    reader = ReadAhead([(experts, range(E)) for experts in shells])
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert threads
    del reader
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_system_without_madvise_evaluates_all_the_same(monkeypatch):
    monkeypatch.setattr(read_ahead, "_madvise", None)
    experts = BUILD["plain"]().eval()
    shell, rows_RD = mapped(BUILD["plain"], experts), torch.randn(E, D)
    with torch.no_grad():
        assert torch.equal(ReadAhead([(shell, range(E))]).run(shell, rows_RD, (1,) * E), experts(rows_RD, (1,) * E))
