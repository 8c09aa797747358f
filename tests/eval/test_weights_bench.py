"""The benchmark of weight formats: what it counts as bytes of a step, and its table."""

import pytest
import torch
import typer
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from scout_hf.eval.bench.weights import main, step_bytes
from tests.integration.common import llama


def test_a_step_reads_all_but_an_embedding_that_is_not_the_head():
    model = llama()
    held, embedding = (sum(one.numel() for one in part.parameters()) for part in (model, model.model.embed_tokens))
    assert step_bytes(model) == 4 * (held - embedding)
    assert step_bytes(llama(tie_word_embeddings=True)) == 4 * (held - embedding)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_weights_count_with_their_scales():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no 8-bit kernels in this torch")
    model = nn.Module()
    model.projection, model.head = nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False)
    model.get_input_embeddings, model.get_output_embeddings = lambda: nn.Embedding(4, 4), lambda: None
    assert step_bytes(model) == 4 * (64 * 32 + 32 * 16)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert step_bytes(model) == 32 * (64 + 4) + 16 * (32 + 4)


def test_the_table_has_a_row_per_format(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)
    assert not hasattr(config, "head_dim"), "take a family whose config does not say it"
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    main(str(tmp_path), context=[0, 64], formats=["float32", "nothing"], threads=1, repeat=3)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [len(line) for line in lines] == [8] * len(lines)
    assert lines[1][0] == "| float32" and all("(" in cell for cell in lines[1][2:])


def test_caches_beyond_memory_are_refused_before_anything_is_loaded(tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(typer.BadParameter, match="fewer --context or --format"):
        main(str(tmp_path), context=[1 << 32], formats=["float32"], threads=1, repeat=3)
