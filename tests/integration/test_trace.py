"""handle.trace: what it reports of a decode step is true, and nothing is left behind."""

import copy
import json
import sys
import threading

import pytest
import torch

import scout_hf
from scout_hf.errors import ConfigError, PatchError
from scout_hf.kernels.cpu import native_backend
from scout_hf.trace import Tracer
from tests.integration.common import EXACT_METHODS, LOSSY, assert_equal, llama, prompt, run
from tests.integration.disturbances import Planted, raise_once
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
    assert set(lanes.values()) == {"main thread", "CPU pool", "copies"}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["tid"] in lanes and event["ts"] >= 0 and event["dur"] >= 0 for event in spans)
    assert [event["ts"] for event in spans] == sorted(event["ts"] for event in spans)
    assert len([event for event in spans if event["name"] == "step"]) == 3
    assert {f"layer {index}" for index in range(3)} <= {event["name"] for event in spans}
    assert trace.image.read_bytes().startswith(b"\x89PNG")
    assert trace.events == events and trace.path == tmp_path / "step.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.png"]
    arrows = [event["ph"] for event in events if event["name"] == "started"]
    assert arrows.count("s") == arrows.count("f") == len([e for e in spans if e["cat"] in ("attention", "copy")])


def test_the_cpu_is_asked_a_layer_ahead(tmp_path):
    def asked_before_their_layer(options):
        spans = traced(tmp_path / "step.json", options).spans
        found = []
        for step in [span for span in spans if span.kind == "step"]:
            here = [span for span in spans if inside(span, step)]
            begins = {span.layer: span.begin for span in here if span.kind == "layer"}
            found += [span.submitted < begins[span.layer] for span in here if span.kind == "attention" and span.layer]
        return found

    ahead = asked_before_their_layer(LOSSY | {"recall": None})
    beside = asked_before_their_layer(LOSSY | {"recall": None, "layer_ahead": False})
    assert ahead and all(ahead) and beside and not any(beside)


def inside(span, other):
    return other.begin <= span.begin and span.end <= other.end


@pytest.mark.parametrize("backend", ["native", "torch"] if ISAS else ["torch"])
def test_the_share_of_a_layer_is_asked_for_in_the_layer_before(tmp_path, backend):
    spans = traced(tmp_path / "step.json", LOSSY | {"recall": None, "cpu_backend": backend}, steps=9).spans
    for step in [span for span in spans if span.kind == "step"]:
        here = [span for span in spans if span is not step and inside(span, step)]
        layers = {span.layer: span for span in here if span.kind == "layer"}
        assert list(layers) == [0, 1, 2]
        for span in here:
            if span.kind == "ahead":  # of the next layer
                assert inside(span, layers[span.layer - 1])
            elif span.kind in ("attend", "settle", "join"):
                assert inside(span, layers[span.layer])
            elif span.kind == "attention":
                before = layers[max(span.layer - 1, 0)]
                assert before.begin <= span.submitted <= before.end and span.submitted <= span.begin
        # The first layer has none before.
        assert [span.layer for span in here if span.kind == "ahead"] == [1, 2]


@pytest.mark.skipif(not ISAS, reason="needs the native library")
def test_every_job_of_every_step_is_told_of(tmp_path, monkeypatch):
    """The native pool remembers some hundred jobs, the trace all that it keeps."""
    started, real = [], native_backend.NativeBackend.start
    monkeypatch.setattr(
        native_backend.NativeBackend, "start", lambda *args, **more: started.append(0) or real(*args, **more)
    )
    monkeypatch.setattr(native_backend.NativeBackend, "copy", lambda *_, **__: None)
    spans = traced(tmp_path / "step.json", LOSSY, steps=400, new=330).spans
    assert len([span for span in spans if span.kind == "step"]) == 329
    assert len(started) > 600 and len([span for span in spans if span.kind == "attention"]) == len(started)


def test_the_last_steps_are_kept_and_no_others(tmp_path):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle, handle.trace(tmp_path / "step.json", steps=2) as trace:
        run(model, prompt(1, 90), new=40)
        assert len(handle._hooks.tracer._steps) == 2
    first, second = (span for span in trace.spans if span.kind == "step")
    assert first.end <= second.begin
    assert all(first.begin <= span.begin for span in trace.spans)


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
        for owner in (handle._hooks.backend, handle._hooks.movers, handle._hooks.links, handle._hooks.counters):
            assert not {"start", "copy", "submit", "limit", "limit_cpu", "timed"} & set(vars(owner))
        methods = [layer.method for layer in got.past_key_values.layers]
        assert not any({"ahead", "attend", "settle"} & set(vars(method)) for method in methods)
        assert_equal(run(model, prompt(), new=12), expected)


def test_untraced_steps_meet_no_recorder(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("recorded")

    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        for name in ("begin", "_timed", "_job", "_enter"):
            monkeypatch.setattr(Tracer, name, fail)
        run(model, prompt(), new=4)
        assert handle._hooks.tracer is None


def test_a_body_that_raises_writes_nothing(tmp_path, monkeypatch):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        raise_once(monkeypatch, model.model.layers[2].mlp, 3)
        with pytest.raises(Planted), handle.trace(tmp_path / "step.json"):
            run(model, prompt(), new=12)
        assert not list(tmp_path.iterdir()) and handle._hooks.tracer is None
        assert "start" not in vars(handle._hooks.backend)
        with handle.trace(tmp_path / "step.json"):
            run(model, prompt(), new=12)


def test_wrong_use_is_refused_at_once(tmp_path):
    model = llama()
    handle = scout_hf.patch(model, **LOSSY)
    (tmp_path / "folder.json").mkdir()
    paths = (tmp_path / "step.txt", tmp_path / "no" / "step.json", tmp_path / "folder.json")
    for path, steps in (
        *((path, 2) for path in (*paths, None, 3)),
        (tmp_path / "s.json", 0),
        (tmp_path / "s.json", True),
    ):
        with pytest.raises(ConfigError, match="not allowed"), handle.trace(path, steps):
            raise AssertionError("never entered")
    with handle.trace(tmp_path / "step.json"):
        with pytest.raises(PatchError, match="already"):
            handle.trace(tmp_path / "other.json")
        run(model, prompt(), new=4)
    one, other = handle.trace(tmp_path / "step.json"), handle.trace(tmp_path / "other.json")
    with one:
        with pytest.raises(PatchError, match="already"), other:
            raise AssertionError("never entered")
        run(model, prompt(), new=4)
    late = handle.trace(tmp_path / "step.json")
    with pytest.raises(ConfigError, match="nothing was decoded"), handle.trace(tmp_path / "empty.json"):
        pass
    handle.remove()
    with pytest.raises(PatchError, match="removed"):
        handle.trace(tmp_path / "step.json")
    with pytest.raises(PatchError, match="removed"), late:
        raise AssertionError("never entered")


def test_files_that_cannot_be_written_leave_no_halves(tmp_path, monkeypatch):
    model, path = llama(), tmp_path / "step.json"
    with scout_hf.patch(model, **LOSSY) as handle:
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, "matplotlib.figure", None)
            with pytest.raises(ConfigError, match=r"pip install 'scout_hf\[bench\]'"), handle.trace(path):
                run(model, prompt(), new=4)
        assert list(tmp_path.iterdir()) == [path] and json.loads(path.read_text())["traceEvents"]
        before = path.read_bytes()

        def full(*_, **__):
            raise OSError("no space left")

        monkeypatch.setattr(json, "dumps", full)
        with pytest.raises(OSError, match="no space"), handle.trace(path):
            run(model, prompt(), new=4)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_patch_that_is_removed_inside(tmp_path):
    model = llama()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    handle = scout_hf.patch(model, **LOSSY)
    with handle.trace(tmp_path / "step.json") as trace:
        run(model, prompt(), new=6)
        handle.remove()
        assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
        stock = run(model, prompt(), new=4)
    assert len([span for span in trace.spans if span.kind == "step"]) == 2 and trace.image.exists()
    assert not isinstance(stock.past_key_values, scout_hf.ScoutCache)


def test_a_copy_of_the_model_is_not_traced(tmp_path):
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        with handle.trace(tmp_path / "step.json", steps=50) as trace:
            run(model, prompt(), new=4)
            twin = copy.deepcopy(model)
            run(twin, prompt(), new=6)
            twins = twin.__dict__["_scout_handle"]
            with twins.trace(tmp_path / "twin.json", steps=50) as other:
                run(twin, prompt(), new=8)
            run(model, prompt(), new=4)
        steps = [len([span for span in one.spans if span.kind == "step"]) for one in (trace, other)]
        assert steps == [6, 7] and (tmp_path / "twin.json").exists()


def test_two_models_on_two_threads(tmp_path):
    models, traces, errors = [llama(), llama(seed=1)], [None, None], []
    expected = []
    for model in models:
        with scout_hf.patch(model, **LOSSY):
            expected.append(run(model, prompt(1, 60), new=20))

    def decode(number):
        try:
            with scout_hf.patch(models[number], **LOSSY) as handle:
                with handle.trace(tmp_path / f"{number}.json", steps=100) as traces[number]:
                    assert_equal(run(models[number], prompt(1, 60), new=20), expected[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for trace in traces:
        steps = [span for span in trace.spans if span.kind == "step"]
        assert len(steps) == 19 and all(one.end <= two.begin for one, two in zip(steps, steps[1:]))
        assert len([span for span in trace.spans if span.kind == "layer"]) == 19 * 3


def test_a_block_that_ends_while_another_thread_decodes(tmp_path):
    model, inside_step, go_on = llama(), threading.Event(), threading.Event()

    def stop(*_):
        inside_step.set()
        go_on.wait(60)

    with scout_hf.patch(model, **LOSSY) as handle:
        expected, found = run(model, prompt(), new=8), []
        with handle.trace(tmp_path / "step.json"):
            run_there = threading.Thread(target=lambda: found.append(run(model, prompt(), new=8)))
            calls = []
            hook = model.model.layers[2].register_forward_pre_hook(
                lambda *_: stop() if len(calls) == 4 or calls.append(0) else None
            )
            run_there.start()
            assert inside_step.wait(60)
        go_on.set()
        run_there.join()
        hook.remove()
        assert_equal(found[0], expected)
        assert "start" not in vars(handle._hooks.backend) and "timed" not in vars(handle._hooks.counters)
        methods = [layer.method for layer in found[0].past_key_values.layers]
        assert not any({"ahead", "attend", "settle"} & set(vars(method)) for method in methods)
        assert not model.model.layers[0]._forward_hooks


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
