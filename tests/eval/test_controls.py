"""Control digests: the best blocks there are, and those that no look is taken for."""

import pytest
import torch

import scout_hf
from scout_hf import ConfigError, ScoutConfig
from scout_hf.eval.baselines import OracleBlocks
from scout_hf.eval.decode_path import prefill
from tests.integration.common import llama, prompt


class TestOracle:
    def test_score_is_the_mass_over_tokens_summed_over_the_group(self):
        generator = torch.Generator().manual_seed(3)
        keys, query = (torch.randn(size, generator=generator) for size in ((2, 2, 5, 8, 4), (2, 6, 1, 4)))
        oracle = OracleBlocks()
        got = oracle.score(query, oracle.encode(keys, None))
        for row in range(2):
            for head in range(2):
                wanted = torch.zeros(5)
                for member in range(3):
                    logits = keys[row, head].reshape(40, 4) @ query[row, 3 * head + member, 0] / 4**0.5
                    wanted += logits.softmax(0).view(5, 8).sum(1)
                assert torch.allclose(got[row, head], wanted, atol=1e-6)

    def test_no_other_choice_of_as_many_blocks_captures_more(self):
        model, ids = llama(), prompt(tokens=200)
        caught = {}
        for digest in ("oracle", "minmax", "recent"):
            config = ScoutConfig(digest=digest, budget=64, block_size=8, sinks=0, window=0, split="off", monitor=1.0)
            with scout_hf.patch(model, config) as handle, torch.no_grad():
                cache = prefill(model, handle.new_cache(), ids)
                model(ids[:, :1], past_key_values=cache)
                caught[digest] = [layer.fidelity for layer in handle.stats().layers]
        assert all(one.block_recall == 1.0 for one in caught["oracle"])
        # Only the first layer's query is the same in all three.
        assert caught["oracle"][0].mass > max(caught["minmax"][0].mass, caught["recent"][0].mass)

    def test_padding_is_refused(self):
        padding_mask = torch.ones(1, 5, 8, dtype=torch.bool)
        OracleBlocks().encode(torch.zeros(1, 2, 5, 8, 4), padding_mask)
        padding_mask[0, 0, 0] = False
        with pytest.raises(ValueError, match="no padding"):
            OracleBlocks().encode(torch.zeros(1, 2, 5, 8, 4), padding_mask)


def test_a_digest_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="oracle"), scout_hf.patch(llama(), digest="guess"):
        pass
