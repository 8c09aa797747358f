"""What a captured decode step launches per layer: counted, as no GPU is needed for that.

Of a fake capture, whose log has each kernel of this package as one entry. Views and operations whose result has no
elements launch nothing.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.selection import Selector  # noqa: E402
from tests.integration import fake_graph  # noqa: E402
from tests.integration.common import LOSSY, left_padded, prompt  # noqa: E402
from tests.libraries import ISAS  # noqa: E402
from tests.patches.tiny import tiny_model  # noqa: E402
from tests.triton import reference  # noqa: E402

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the native library")

SPARSE = LOSSY | {"digest": "minmax", "resident": None, "recall": 0.12, "hand_over": "graph"}
VIEWS = (
    *("view", "_unsafe_view", "slice", "select", "detach", "t", "expand", "transpose", "unsqueeze", "alias", "split"),
    *("split_with_sizes", "empty", "empty_like"),
)
KINDS = {
    "norm": ("rms_norm", "pow", "mean", "rsqrt"),
    "rotate": ("rotate", "neg", "cat"),
    "gate": ("silu_product", "silu"),
    "product": ("mm", "addmm", "bmm"),
    "own": ("scores", *(name for name in fake_graph.LAUNCHED if name not in ("rms_norm", "rotate", "silu_product"))),
}
OWN, MOST = 10, 32
"""Own kernels of a layer (scores, choice, query to the CPU, append, two attend, wait, merge, plan, copy), and all."""


@pytest.fixture
def graphs(monkeypatch):
    reference.install(monkeypatch)
    made = fake_graph.install(monkeypatch)
    # One kernel on a GPU, whose reference is many operations.
    monkeypatch.setattr(Selector, "scores", fake_graph.recorded(Selector.scores))
    return made


def launched(graphs, family, layers, padded, **options):
    """Launches of the last captured step, by name."""
    given = left_padded(0, 13, tokens=60) if padded else {"input_ids": prompt(2, 60)}
    model, mask = tiny_model(family, num_hidden_layers=layers).bfloat16(), given.get("attention_mask")
    with scout_hf.patch(model, **SPARSE | options) as handle, torch.no_grad():
        cache = handle.new_cache()
        model.model(**given, past_key_values=cache)
        for step in range(4):
            more = {"input_ids": prompt(2, 1, step)}
            if padded:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                more |= {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            model.model(**more, past_key_values=cache)
    found = Counter()
    for func, _, _, out in graphs.made[-1].log:
        name = func.__name__.split(".")[0]
        results = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        found[name] += name not in VIEWS and (not results or any(one.numel() for one in results))
    return found


def per_layer(*args, **options):
    """The same per layer, by kind; what has another name is counted by that."""
    few, more = (launched(args[0], args[1], layers, *args[2:], **options) for layers in (2, 6))
    found = Counter()
    for name in more:
        kind = next((kind for kind, names in KINDS.items() if name in names), name)
        found[kind] += (more[name] - few[name]) / 4
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["rows", "padded"])
@pytest.mark.parametrize("query", ["predicted", "real"])
def test_a_layer_of_llama(graphs, query, padded):
    """Also where the query of the next layer is predicted: its norm, projection and rotation are counted here too."""
    found = per_layer(graphs, "llama", padded, cpu_query=query)
    expected = {"norm": 3, "rotate": 2, "gate": 1, "product": 8, "own": OWN, "add": 2}
    assert +found == Counter(expected) and sum(expected.values()) <= MOST


@pytest.mark.parametrize("family, extra", [("qwen3", {"norm": 6}), ("gemma", {"gate": 0, "gelu": 1, "mul": 1})])
def test_layers_of_others(graphs, family, extra):
    """Qwen3 normalises the heads of query, key and predicted query; Gemma's gate opens by GELU, which is left alone."""
    found = per_layer(graphs, family, False)
    expected = {"norm": 3, "rotate": 2, "gate": 1, "product": 8, "own": OWN, "add": 2} | extra
    assert +found == +Counter(expected) and sum(expected.values()) <= MOST


def test_that_the_count_counts(graphs):
    """With the model's own operations: a norm makes eight, a rotation of a query and of keys five each."""
    found = per_layer(graphs, "llama", False, fused=False)
    assert found["norm"] == 3 * 3 and found["rotate"] == 3 * 2 and found["_to_copy"] == 3 * 2
    assert found["mul"] == 3 * 2 + 3 * 2 + 1 and found["add"] == 3 + 3 + 2
    assert sum(found.values()) == 61 and found["own"] == OWN
