"""A model whose masks are made outside its decoder: text through Gemma3ForConditionalGeneration."""

import pytest
import torch

import scout_hf
from tests.patches.tiny import tiny_gemma3_multimodal


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_text_prompts_with_padding(split):
    model = tiny_gemma3_multimodal().eval()
    ids = torch.randint(5, 60, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    stock = model.generate(ids, **options)
    with scout_hf.patch(
        model, budget=None, block_size=8, window=8, resident=16, split=split, layer_ahead=False
    ) as handle:
        ours = model.generate(ids, **options)
        assert handle.stats().steps == 9
    for found, expected in zip(ours.logits, stock.logits):
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
