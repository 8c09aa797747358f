"""The parts of a trace: events, files that are whole, the picture, the clocks of devices, and the command's figures."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from scout_hf.diagnostics import parts_of_spans
from scout_hf.errors import ConfigError
from scout_hf.files import check_timeline_path
from scout_hf.trace import COPIES, LINK, MAIN, POOL, SLOW_CPU, Span, Trace, Tracer
from scout_hf.trace_device import DeviceClocks
from scout_hf.trace_files import lanes_of, trace_events, write
from tests.fake_cuda import Event, Stream

US, MS = 1000, 1_000_000


def a_step(begin=0, layers=2):
    """Each layer takes 10 ms, waits for 1 of them, and starts the next one's job of 4 ms, which ends in that wait."""
    spans = [Span(MAIN, "step", None, begin, begin + 10 * MS * layers)]
    for layer in range(layers):
        at = begin + layer * 10 * MS
        spans += [Span(MAIN, "layer", layer, at, at + 10 * MS), Span(MAIN, "attend", layer, at + 4 * MS, at + 9 * MS)]
        spans += [Span(MAIN, "join", layer, at + 5 * MS, at + 6 * MS)]
        if layer:
            spans += [Span(MAIN, "ahead", layer, at - 9 * MS, at - 8 * MS)]
            spans += [Span(POOL, "attention", layer, at + 2 * MS, at + 6 * MS, at - 8 * MS)]
    return spans


def test_events_are_what_chrome_wants():
    spans = [*a_step(5 * MS), Span("GPU 0", "layer", 0, 5 * MS, 6 * MS), Span(LINK, "copy", 1, 6 * MS, 9 * MS, 6 * MS)]
    events = json.loads(json.dumps(trace_events(spans)))
    by_phase = {phase: [event for event in events if event["ph"] == phase] for phase in "MXsf"}
    assert sum(map(len, by_phase.values())) == len(events) and len(by_phase["X"]) == len(spans)
    lanes = {event["tid"]: event["args"]["name"] for event in by_phase["M"] if event["name"] == "thread_name"}
    assert list(lanes.values()) == [MAIN, "GPU 0", POOL, LINK] and sorted(lanes) == list(lanes)
    job = next(event for event in by_phase["X"] if event["cat"] == "attention")
    assert job["name"] == "attention 1" and job["args"] == {"layer": 1} and lanes[job["tid"]] == POOL
    assert (job["ts"], job["dur"]) == (12000, 4000)  # microseconds
    (start,), (finish,) = by_phase["s"], by_phase["f"]
    assert start["id"] == finish["id"] and (start["ts"], finish["ts"]) == (2000, 12000)
    assert lanes[start["tid"]] == MAIN and lanes[finish["tid"]] == POOL
    assert Trace.events.fget(type("Empty", (), {"spans": []}))[0]["args"] == {"name": "scout_hf"}


def test_lanes_from_top_to_bottom():
    lanes = [SLOW_CPU, LINK, "GPU 1", POOL, "GPU 0 recall", COPIES, MAIN, "GPU 0"]
    spans = [Span(lane, "copy", 0, 0, 1) for lane in lanes]
    assert lanes_of(spans) == [MAIN, "GPU 0", "GPU 0 recall", "GPU 1", POOL, COPIES, LINK, SLOW_CPU]


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    write(a_step(), path)
    before = path.read_text()
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(a_step(layers=5), path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["step.txt", "step", "no/step.json", "here.json", "taken.json"])
def test_places_that_cannot_be_written_to(tmp_path, name):
    (tmp_path / "here.json").mkdir()
    (tmp_path / "taken.png").mkdir()
    path = tmp_path / name
    with pytest.raises(ConfigError, match="path=.*not allowed.*try"):
        check_timeline_path(path, path.with_suffix(".png"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a folder that not even root writes to")
def test_a_folder_that_cannot_be_written_to():
    from pathlib import Path

    with pytest.raises(ConfigError, match="cannot be written to"):
        check_timeline_path(Path("/proc/step.json"))


@pytest.mark.parametrize("layers", [1, 2, 120])
def test_a_picture(tmp_path, layers):
    pytest.importorskip("matplotlib")
    from scout_hf.trace_picture import draw

    late = Span(COPIES, "copy", layers - 1, -2 * MS, 1 * MS, -3 * MS)
    nameless = Span(POOL, "attention", None, 1 * MS, 2 * MS, 0)
    draw([*a_step(0, layers), late, nameless, Span("GPU 0", "device", None, 0, MS)], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_waits_lie_on_top(tmp_path, monkeypatch):
    """A wait is a part of attending: painted below, it would not be seen."""
    figure = pytest.importorskip("matplotlib.figure")
    from matplotlib.colors import to_hex

    from scout_hf.trace_picture import COLOURS, draw

    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: seen.append(self))
    draw(a_step(), tmp_path / "step.png")
    painted = [to_hex(bar.get_facecolor()[0]) for bar in seen[0].axes[0].collections]
    order = [max(i for i, colour in enumerate(painted) if colour == COLOURS[kind]) for kind in ("layer", "attend")]
    assert sorted(order) == order and order[-1] < painted.index(COLOURS["join"])


def test_without_matplotlib(tmp_path, monkeypatch):
    from scout_hf.trace_picture import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'scout_hf\[bench\]'"):
        draw(a_step(), tmp_path / "step.png")
    assert not list(tmp_path.iterdir())


def test_what_a_step_was_made_of():
    found = parts_of_spans([*a_step(), *a_step(30 * MS)])
    assert found["steps"] == 2 and found["step_ms"] == 20 and found["wait_ms"] == 2
    assert found["attention_jobs"] == 1 and found["attention_ms"] == 4 and found["attention_ahead"] == 1
    assert found["attention_hidden"] == pytest.approx(3 / 4) and "copy_ms" not in found
    # An emulated CPU takes the place of the one that did the work.
    slow = Span(SLOW_CPU, "attention", 1, 2 * MS, 12 * MS, 2 * MS)
    assert parts_of_spans([*a_step(), slow])["attention_ms"] == 10
    # Recall: of a layer that is over, for the step after.
    recall = Span(COPIES, "copy", 0, 9 * MS, 11 * MS, 9 * MS)
    assert parts_of_spans([*a_step(), recall])["copy_ahead"] == 0
    across = Span(COPIES, "copy", 0, 29 * MS, 31 * MS, 25 * MS)
    assert parts_of_spans([*a_step(), across])["copy_ahead"] == 0


def test_a_tracer_without_layers_records_nothing():
    tracer = Tracer()
    tracer.begin(None)
    tracer.end()
    assert not tracer.open and tracer.spans() == []


@pytest.fixture
def device(monkeypatch):
    """A fake GPU with its own clock."""
    stream = Stream("cuda:0")
    for name, value in {
        "Event": Event, "current_stream": lambda device=None: stream, "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return stream.device


def test_the_time_of_a_device_in_that_of_the_host(device):
    clocks = DeviceClocks()
    before = time.perf_counter_ns()
    begin = clocks.mark(device)
    time.sleep(0.01)
    end = clocks.mark(device)
    after, times = time.perf_counter_ns(), clocks.between(device, begin, end)
    assert times() is None
    time.sleep(0.01)
    asked = time.perf_counter_ns()
    clocks.settle()
    # As late as the host was to read its clock.
    late, (first, last) = time.perf_counter_ns() - asked, times()
    assert before - US <= first <= last - 9 * MS and last <= after + late + US


def test_where_a_device_has_no_time(device, monkeypatch):
    clocks = DeviceClocks()
    assert clocks.mark(torch.device("cpu")) is None and clocks.mark(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert clocks.mark(device) is None  # it would become a part of the graph
    clocks.settle()
