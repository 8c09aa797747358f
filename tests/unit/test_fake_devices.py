"""The fakes refuse what GPUs refuse, and compute the rest as a CPU does."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.fake_cuda import install, use_references  # noqa: E402
from tests.fake_devices import FakeDevices, MixedDevices, OnDevice  # noqa: E402

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    with FakeDevices():
        yield install(monkeypatch)


@pytest.fixture
def one():
    return OnDevice(torch.arange(4.0), FIRST)


@pytest.fixture
def other():
    return OnDevice(torch.arange(4.0), SECOND)


def test_results_are_where_their_operands_are(one, other):
    assert (one + one).device == FIRST and (other * 2).device == SECOND
    assert (other + torch.tensor(1.0)).tolist() == [1.0, 2.0, 3.0, 4.0]  # a number of the CPU
    made = torch.zeros(2, device="cuda:1"), torch.empty_like(other), other.new_ones(2), torch.tensor([1], device=SECOND)
    assert all(each.device == SECOND for each in made)
    assert (one + other.to(FIRST)).device == FIRST and type(other.cpu()) is torch.Tensor


@pytest.mark.parametrize(
    "operation",
    [
        lambda one, other: one + other,
        lambda one, other: one + torch.ones(4),
        lambda one, other: torch.ones(4) + one,
        lambda one, other: torch.ones(4) + one.sum(),
        lambda one, other: one + other.sum(),
        lambda one, other: torch.cat([one, other]),
        lambda one, other: one[other.long()],
        lambda one, other: torch.ones(4)[one.long()],
        lambda one, other: one.index_select(0, torch.tensor([1])),
        lambda one, other: one.index_put_((torch.tensor([1]),), torch.ones(1)),
        lambda one, other: one.index_put_((torch.tensor([1]),), other[:1]),
        lambda one, other: torch.where(one > 0, one, other),
        lambda one, other: torch.add(one, one, out=other),
        lambda one, other: one.pin_memory(),
        lambda one, other: torch.empty(1, device=FIRST, pin_memory=True),
    ],
)
def test_mixing_devices_is_refused(one, other, operation):
    with pytest.raises(MixedDevices):
        operation(one, other)


def test_copies_and_indices_cross(one, other):
    one.copy_(other + 1)
    assert one.tolist() == [1.0, 2.0, 3.0, 4.0]
    one[torch.tensor([0, 2])] = one[[1, 3]]
    assert one.tolist() == [2.0, 2.0, 4.0, 4.0]
    one[1:3] = torch.zeros(2)
    assert one.tolist() == [2.0, 0.0, 0.0, 4.0]


def test_views_share_memory(one):
    view = one.view(2, 2).transpose(0, 1)[1]
    view.fill_(9)
    assert one.tolist() == [0.0, 9.0, 2.0, 9.0] and view.data_ptr() == one[1:].data_ptr()
    same = one.add_(1)
    assert same is one and view.tolist() == [10.0, 10.0]


def test_events_and_streams_belong_to_one_device(one):
    first, second = torch.cuda.Stream(FIRST), torch.cuda.Stream(SECOND)
    event = first.record_event()
    second.wait_event(event)  # may cross
    with pytest.raises(MixedDevices):
        second.record_event(event)
    with pytest.raises(MixedDevices):
        event.elapsed_time(second.record_event())
    one.record_stream(first)
    with pytest.raises(MixedDevices):
        one.record_stream(second)
    with torch.cuda.stream(second):
        assert torch.cuda.current_device() == 1 and torch.cuda.current_stream() is second
        assert torch.cuda.current_stream(FIRST) not in (first, second)
    assert torch.cuda.current_device() == 0 and torch.cuda.current_stream(SECOND) is not second


def test_kernels_take_one_device_and_pinned_memory(cuda, monkeypatch, one, other):
    kernels = use_references(monkeypatch, cuda)
    number = torch.zeros(1, dtype=torch.int64, device=FIRST)
    query, flag = torch.empty(4, pin_memory=True), torch.zeros(1, dtype=torch.int64, pin_memory=True)
    kernels.post(one, query, flag, number)
    assert query.tolist() == one.tolist() and int(flag) == int(number) == 1
    assert [(launch.name, launch.device) for launch in cuda.launched] == [("post", FIRST)]
    with pytest.raises(MixedDevices):
        kernels.post(other, query, flag, number)
    with pytest.raises(MixedDevices):
        kernels.post(one, torch.empty(4), flag, number)
    with pytest.raises(MixedDevices, match="launched on cuda:0"):
        cuda.launch("add", torch.add, (other, other), {}, guarded=True)
    with torch.cuda.device(1):
        assert cuda.launch("add", torch.add, (other, other), {}, guarded=True).device == SECOND
