"""Order between streams, with a driver that writes down what it is asked for; and the work itself without one."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from scout_hf.stores import PagedKV, TwoTierKV
from scout_hf.stores.streams import Links, Mark
from tests.unit.naive import poison

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.name))

    def record_event(self):
        event = Event(f"mark {len(self.log)}", self.log)
        self.log.append((self.name, "records", event.name))
        return event


class Event:
    def __init__(self, name, log):
        self.name, self.log, self.over = name, log, False

    def synchronize(self):
        self.log.append(("host", "waits for", self.name))

    def query(self):
        return self.over


@pytest.fixture
def log(monkeypatch):
    events, current = [], []
    main = Stream("main", events)
    made = iter(range(9))

    @contextlib.contextmanager
    def stream(one):
        current.append(one)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1] if current else main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side {next(made)}", events))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return events


class Used:
    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream.name)


def test_work_beside_begins_after_what_it_needs_and_keeps_its_memory(log):
    links, used = Links(), Used()
    before = links.mark(GPU)
    with links.beside("write-back", GPU, used, after=before) as mark:
        log.append("work")
    mark.before(GPU)
    mark.finish()
    assert log == [
        ("main", "records", "mark 0"),
        ("side 0", "waits for", "main"),
        ("side 0", "waits for", "mark 0"),
        "work",
        ("side 0", "records", "mark 4"),
        ("main", "waits for", "mark 4"),
        ("host", "waits for", "mark 4"),
    ]
    assert used.streams == ["side 0"] and not mark.done()


def test_work_of_one_name_shares_a_stream_and_copies_do_not(log):
    links = Links()
    for name in ("recall", "past", "recall"):
        with links.beside(name, GPU):
            pass
    with copy.deepcopy(links).beside("recall", GPU):
        pass
    assert [entry[0] for entry in log if entry[1:] == ("waits for", "main")] == ["side 0", "side 1", "side 0", "side 2"]


def test_a_captured_step_ends_with_all_work_beside_it(log, monkeypatch):
    links = Links()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for name in ("recall", "past"):
        with links.beside(name, GPU):
            pass
    log.clear()
    links.join_captured(GPU)
    links.join_captured(GPU)
    assert [entry[:2] for entry in log] == [("main", "waits for")] * 2


def test_on_a_cpu_everything_is_done_at_once():
    links, done = Links(), []
    with links.beside("recall", CPU, torch.ones(1), after=Mark()) as mark:
        done.append(1)
    mark.before(CPU)
    mark.finish()
    assert done and mark.done() and links.mark(CPU).done()
    links.join_captured(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("staged", [1 << 30, 1])
def test_whole_blocks_go_beside_as_they_would_go_plainly(dtype, staged, monkeypatch):
    from scout_hf.stores import host, pages

    poison(monkeypatch)
    monkeypatch.setattr(host, "STAGED_BYTES", staged)
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 3)
    generator = torch.Generator().manual_seed(0)
    beside, plain = (PagedKV(2, 3, 16, 8, dtype, "cpu") for _ in range(2))
    for blocks in (5, 1, 1, 9, 2):
        keys, values = torch.randn(2, 2, 3, blocks * 8, 16, generator=generator).to(dtype)
        assert beside.append_beside(keys.clone(), values.clone(), Links()).done()
        plain.append(keys, values)
        for one, other in zip(beside.read(0, beside.length), plain.read(0, plain.length)):
            assert torch.equal(one, other)
    assert len(beside.table.pool.slabs) > 2


def test_runs_of_pages_are_views_in_order(monkeypatch):
    from scout_hf.stores import pages

    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 4)
    pool = pages.PagePool((2,), torch.int64, CPU)
    for _ in range(3):
        pool.allocate(4)
    for number in range(pool.pages):
        pool.write(torch.tensor([number]), torch.full((1, 2), number))
    for ids in ([0, 1, 2, 3], [2, 3, 4, 5], [7, 3, 4, 1], [9], [], [11, 10, 9]):
        found = list(pool.runs(torch.tensor(ids, dtype=torch.int64)))
        assert torch.cat([torch.zeros(0, 2), *found])[:, 0].tolist() == ids
        assert all(any(run.data_ptr() >= slab.data_ptr() for slab in pool.slabs) for run in found)
    assert [len(run) for run in pool.runs(torch.tensor([0, 1, 2, 3]))] == [4]


def test_the_tail_stays_where_it_is_once_it_has_its_size():
    """What a captured step relies on."""
    kv = TwoTierKV(1, 1, 4, 8, torch.float32, "cpu")
    tokens = torch.arange(100.0).view(1, 1, 100, 1).expand(1, 1, 100, 4)
    kv.append(tokens[:, :, :30], tokens[:, :, :30])
    kv.write_back(1)
    place = kv.buffers()[0].data_ptr()
    for at in range(30, 100):
        kv.append(tokens[:, :, at : at + 1], tokens[:, :, at : at + 1])
        kv.write_back(1, Links(), in_place=True)
        assert kv.buffers()[0].data_ptr() == place and torch.equal(kv.read(0, at + 1)[0], tokens[:, :, : at + 1])
        keys, _ = kv.tail_blocks()
        assert torch.equal(keys.flatten(2, 3)[:, :, : kv.length - kv.host.length], kv.tail()[0])
