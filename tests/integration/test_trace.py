"""handle.trace: what is told of a decode step is true, and nothing is left behind."""

import json
import threading

import pytest
import torch

import scout_hf
from scout_hf.errors import ConfigError, PatchError
from tests.integration.common import EXACT_METHODS, LOSSY, assert_equal, llama, prompt, run
from tests.integration.test_failures import Planted, raise_once
from tests.libraries import ISAS

pytest.importorskip("matplotlib")


def traced(path, options, steps=3, tokens=90, new=10):
    model = llama()
    with scout_hf.patch(model, **options) as handle:
        with handle.trace(path, steps=steps) as trace:
            run(model, prompt(1, tokens), new=new)
    return trace


@pytest.mark.parametrize("backend", ["native", "torch"] if ISAS else ["torch"])
def test_a_file_that_a_viewer_opens(tmp_path, backend):
    trace = traced(tmp_path / "step.json", LOSSY | {"cpu_backend": backend})
    events = json.loads(trace.path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"main thread", "copies" if backend == "torch" else "CPU pool"} <= set(lanes.values())
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["tid"] in lanes and event["ts"] >= 0 and event["dur"] >= 0 for event in spans)
    assert [event["ts"] for event in spans] == sorted(event["ts"] for event in spans)
    assert len([event for event in spans if event["name"] == "step"]) == 3
    assert {f"layer {index}" for index in range(4)} <= {event["name"] for event in spans}
    assert trace.image.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.png"]


@pytest.mark.skipif(not ISAS, reason="only the native pool tells when a job ran")
def test_the_cpu_begins_a_layer_ahead(tmp_path):
    def jobs_before_their_layer(options):
        spans = traced(tmp_path / "step.json", options).spans
        found = []
        for step in [span for span in spans if span.kind == "step"]:
            inside = [span for span in spans if step.begin <= span.begin <= step.end]
            begins = {span.layer: span.begin for span in inside if span.kind == "layer"}
            found += [span.begin < begins[span.layer] for span in inside if span.kind == "attention" and span.layer]
        return found

    ahead = jobs_before_their_layer(LOSSY | {"recall": None, "threads": 1})
    beside = jobs_before_their_layer(LOSSY | {"recall": None, "layer_ahead": False, "threads": 1})
    assert ahead and beside and not any(beside)
    # Where the pool has no thread of its own, jobs run when they are waited for.
    from scout_hf.kernels.cpu.topology import spare_workers

    assert any(ahead) or not spare_workers(1)


@pytest.mark.parametrize("name", EXACT_METHODS)
def test_other_methods_and_an_emulated_link(tmp_path, name):
    trace = traced(tmp_path / "step.json", EXACT_METHODS[name] | {"link_gbps": 0.1, "cpu_gbps": 0.1})
    lanes = {span.lane for span in trace.spans}
    assert ("CPU (emulated)" if name == "hgca" else "link (emulated)") in lanes
    steps = [span for span in trace.spans if span.kind == "step"]
    for span in trace.spans:
        assert span.begin <= span.end and span.begin >= steps[0].begin - 10**9
        if span.kind in ("attend", "layer", "join"):
            assert any(step.begin <= span.begin and span.end <= step.end for step in steps)


def test_nothing_changes_and_nothing_is_left(tmp_path):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        expected = run(model, prompt(), new=12)
        hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.model.layers]
        with handle.trace(tmp_path / "step.json"):
            got = run(model, prompt(), new=12)
        assert_equal(got, expected)
        assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.model.layers] == hooks
        for owner in (handle._backend, handle._movers, handle._links, handle._counters):
            assert not {"start", "copy", "submit", "limit", "limit_cpu", "timed"} & set(vars(owner))
        methods = [layer.method for layer in got.past_key_values.layers]
        assert not any({"ahead", "attend", "settle"} & set(vars(method)) for method in methods)
        assert_equal(run(model, prompt(), new=12), expected)


def test_a_body_that_raises_writes_nothing(tmp_path, monkeypatch):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        raise_once(monkeypatch, model.model.layers[2].mlp, 3)
        with pytest.raises(Planted), handle.trace(tmp_path / "step.json"):
            run(model, prompt(), new=12)
        assert not list(tmp_path.iterdir()) and handle._tracer is None
        assert "start" not in vars(handle._backend)
        with handle.trace(tmp_path / "step.json"):
            run(model, prompt(), new=12)


def test_wrong_use_is_refused_at_once(tmp_path):
    model = llama()
    handle = scout_hf.patch(model, **LOSSY)
    for path, steps in ((tmp_path / "step.txt", 2), (tmp_path / "no" / "step.json", 2), (tmp_path / "s.json", 0)):
        with pytest.raises(ConfigError, match="not allowed"), handle.trace(path, steps):
            raise AssertionError("never entered")
    with handle.trace(tmp_path / "step.json"):
        with pytest.raises(PatchError, match="already"):
            handle.trace(tmp_path / "other.json")
        run(model, prompt(), new=4)
    with pytest.raises(ConfigError, match="nothing was decoded"), handle.trace(tmp_path / "empty.json"):
        pass
    handle.remove()
    with pytest.raises(PatchError, match="removed"):
        handle.trace(tmp_path / "step.json")


def test_another_thread_decodes_untraced(tmp_path):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        expected = [run(model, prompt(1, 50, seed=seed), new=30) for seed in range(2)]
        found = [None, None]
        with handle.trace(tmp_path / "step.json", steps=100) as trace:
            run(model, prompt(), new=2)
            other = threading.Thread(target=lambda: found.__setitem__(1, run(model, prompt(1, 50, seed=1), new=30)))
            other.start()
            found[0] = run(model, prompt(1, 50, seed=0), new=30)
            other.join()
    for got, before in zip(found, expected):
        assert_equal(got, before)
    assert len([span for span in trace.spans if span.kind == "step"]) == 30
    assert not torch.isnan(torch.stack(found[0].logits)).any()
