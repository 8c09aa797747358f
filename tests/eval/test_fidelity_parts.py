"""The parts of a fidelity study: cells and filters, the oracle's blocks, the memo, questions in batches, outliers."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import scout_hf
from scout_hf import ConfigError, ScoutConfig
from scout_hf.eval.baselines import OracleBlocks
from scout_hf.eval.decode_path import answer, answers, prefill, tokenize
from scout_hf.eval.fidelity.cells import (
    BLOCK,
    BUDGET,
    CONTROLS,
    MAIN,
    METHODS,
    MODES,
    TOKENS,
    Cell,
    cells_of,
    keep,
    parse_filters,
    real_digests,
)
from scout_hf.eval.fidelity.memo import AttentionMemo
from scout_hf.eval.fidelity.stress import FACTOR, SHIFT, apply_stress
from scout_hf.eval.fidelity.subjects import weight_hash
from scout_hf.eval.pocket import ANSWER_WORDS, TASKS, make_document
from scout_hf.selection import digest_names
from tests.integration.common import llama, prompt
from tests.patches.tiny import tiny_config

SPARSE = {"block_size": 16, "budget": 0.25}


def digest(mode):
    return () if mode in METHODS else ("minmax",)


class TestCells:
    def test_every_mode_makes_a_config_of_its_own(self):
        made = [Cell("llama", "needle", 512, mode, 16, 0.25, *digest(mode)).config() for mode in MODES if MODES[mode]]
        assert len(set(made)) == len(MODES) - 1 and all(one.block_size == 16 for one in made)
        assert Cell("llama", "needle", 512).config() is None

    def test_the_modes_shown_most_are_the_shipped_ones(self):
        assert {"real", "predicted-auto"} < set(MAIN)
        for mode, split in (("real", "off"), ("predicted-auto", "cpu")):
            shipped = ScoutConfig(block_size=16, budget=0.25, digest="minmax", split=split)
            assert Cell("llama", "needle", 512, mode, 16, 0.25, "minmax").config() == shipped

    @pytest.mark.parametrize(
        "fields",
        [
            {"mode": "guess", "block_size": 16, "budget": 0.25, "digest": "minmax"},
            {"mode": "real", "block_size": 16, "budget": 0.25},
            {"mode": "hgca", "block_size": 16, "budget": 0.25, "digest": "minmax"},
            {"mode": "hgca", "block_size": 16},
            {"mode": "full", "budget": 0.25},
            {"stress": "much"},
        ],
    )
    def test_what_makes_no_sense_is_refused(self, fields):
        with pytest.raises(ValueError, match="guess|belong to|much"):
            Cell("llama", "needle", 512, **fields)

    def test_filters(self):
        cells = cells_of(("llama",), quick=True)
        kept = keep(cells, parse_filters(["digest=minmax,oracle", "mode=full,real", "digest=recent"]))
        assert {cell.digest for cell in kept} == {None, "minmax", "oracle", "recent"}
        assert {cell.mode for cell in kept} == {"full", "real"}
        # Full attention has no digest, so a filter of digests does not take away what others are compared with.
        assert any(cell.mode == "full" for cell in keep(cells, parse_filters(["digest=minmax"])))

    def test_filters_of_methods(self):
        cells = cells_of(("llama",), quick=False)
        assert not {cell.mode for cell in keep(cells, parse_filters(["digest=minmax"]))} & set(METHODS)
        assert {cell.mode for cell in keep(cells, parse_filters(["mode=hgca,full"]))} == {"hgca", "full"}

    @pytest.mark.parametrize("text", ["digest", "digest=", "=minmax", "speed=high", "digest=maxmin", "budget=0.126"])
    def test_wrong_filters_say_what_there_is(self, text):
        with pytest.raises(ValueError, match=r"--only .*(fields are|nothing of that in this study).*"):
            keep(cells_of(("llama",), quick=True), parse_filters([text]))

    def test_the_whole_study_has_what_was_promised(self):
        cells = cells_of(("llama", "text"), quick=False)
        assert len(set(cells)) == len(cells)
        asked = [cell for cell in cells if cell.model == "llama"]
        assert {cell.task for cell in asked} == set(TASKS)
        assert {cell.digest for cell in asked} == {None, *real_digests(), *CONTROLS}
        assert set(digest_names()) <= {cell.digest for cell in asked}
        assert {cell.mode for cell in asked} == set(MODES)
        methods = [cell for cell in asked if cell.mode in METHODS]
        assert len(methods) == len(METHODS) * len(TASKS) and {"dense", "hgca", "infinigen", "kvpr"} <= set(METHODS)
        assert {(cell.tokens, cell.block_size, cell.budget) for cell in methods} == {(TOKENS, BLOCK, BUDGET)}
        assert {0.03, 0.06, 0.125, 0.25, 0.5, 512} <= {cell.budget for cell in asked}
        assert {cell.block_size for cell in asked} == {None, 16, 32, 64}
        assert {cell.tokens for cell in asked} == {1024, 2048, 4096, 8192}
        assert {cell.stress for cell in asked} == {"none", "scale", "offset", "rivals"}
        assert {cell.task for cell in cells if cell.model == "text"} == {"text"}
        # Every sparse cell has full attention on the same documents to be compared with.
        full = {(cell.model, cell.task, cell.tokens, cell.stress) for cell in cells if cell.mode == "full"}
        assert all((cell.model, cell.task, cell.tokens, cell.stress) in full for cell in cells)

    def test_the_quick_study_is_at_the_centre_of_the_whole_one(self):
        quick, whole = (cells_of(("llama", "text"), quick=quick) for quick in (True, False))
        assert set(quick) <= set(whole) and len(quick) < len(whole) / 3
        assert {(cell.tokens, cell.block_size) for cell in quick if cell.digest} == {(TOKENS, BLOCK)}
        assert {cell.budget for cell in quick if cell.digest and cell.model == "llama"} == {BUDGET}
        assert len({cell.budget for cell in quick if cell.digest and cell.model == "text"}) == 2


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


class TestMemo:
    def read(self, model, ids, **options):
        with scout_hf.patch(model, **options) as handle, torch.no_grad():
            cache = prefill(model, handle.new_cache(), ids)
            last = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(3)]
            return [layer.method.read_all() for layer in cache.layers], last

    @pytest.mark.parametrize("split", ["off", "cpu"])
    def test_a_prompt_read_again_is_bitwise_the_same(self, split):
        model, ids, memo = llama(num_hidden_layers=4), prompt(tokens=90), AttentionMemo()
        options = {"split": split, "budget": 24, "block_size": 8}
        wanted = self.read(model, ids, **options)
        with memo.active():
            for _ in range(2):
                got = self.read(model, ids, **options)
                assert all(torch.equal(a, b) for mine, yours in zip(got[0], wanted[0]) for a, b in zip(mine, yours))
                assert all(torch.equal(a, b) for a, b in zip(got[1], wanted[1]))
        assert (memo.misses, memo.hits) == (4, 4)

    def test_another_prompt_another_model_and_steps_are_not_taken_for_it(self):
        memo = AttentionMemo()
        with memo.active():
            self.read(llama(num_hidden_layers=4), prompt(tokens=90), budget=None)
            self.read(llama(seed=1, num_hidden_layers=4), prompt(tokens=90), budget=None)
            self.read(llama(num_hidden_layers=4), prompt(tokens=90, seed=5), budget=None)
            self.read(llama(num_hidden_layers=4), prompt(tokens=91), budget=None)
        assert memo.hits == 0 and memo.misses == 16

    def test_other_values_alone_are_another_prompt(self):
        model, ids, memo = llama(num_hidden_layers=4), prompt(tokens=40), AttentionMemo()
        with memo.active(), torch.no_grad():
            model(ids)
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight.mul_(2)
            again = model(ids).logits
        assert memo.hits == 0 and torch.equal(again, model(ids).logits)

    def test_a_caller_may_change_what_it_got(self):
        model, ids, memo = llama(num_hidden_layers=4), prompt(tokens=40), AttentionMemo()
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: args[0].add_(1.0))
        with torch.no_grad():
            wanted = model(ids).logits
            with memo.active():
                assert all(torch.equal(model(ids).logits, wanted) for _ in range(3))
        hook.remove()
        assert memo.hits == 8

    def test_padding_goes_past_it(self):
        model, ids, memo = llama(num_hidden_layers=4), prompt(rows=2, tokens=40), AttentionMemo()
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        with memo.active(), torch.no_grad():
            model(ids, attention_mask=mask)
        assert not memo.misses

    def test_room_is_kept_and_nothing_is_left_behind(self):
        before = torch.nn.functional.scaled_dot_product_attention
        memo = AttentionMemo(room=5 * 90 * 64 * 4)
        with pytest.raises(RuntimeError, match="stop"), memo.active(), torch.no_grad():
            for seed in range(3):
                llama(num_hidden_layers=4)(prompt(tokens=90, seed=seed))
                assert memo.used <= memo.room
            raise RuntimeError("stop")
        assert torch.nn.functional.scaled_dot_product_attention is before
        assert memo.misses == 12 and memo.used > 0


class TestAsking:
    @pytest.mark.parametrize(
        "options",
        [None, {"split": "off"}, {"split": "off", "digest": "sign"}, {"split": "cpu", "recall": None}],
        ids=str,
    )
    def test_together_as_one_by_one(self, pocket, options):
        model, tokenizer = pocket
        documents = [make_document(512, 8, seed=seed) for seed in (3, 4)]
        read = [tokenize(tokenizer, document.text) for document in documents]
        # Not in the order of the documents, and one shorter than the others.
        asked = [(owner, documents[owner].facts[number].question) for number in range(4) for owner in (1, 0)]
        asked[3] = (asked[3][0], asked[3][1].split(" call ", 1)[1])
        owners = [owner for owner, _ in asked]
        questions = [tokenizer(text, add_special_tokens=False).input_ids for _, text in asked]
        handle = None if options is None else scout_hf.patch(model, **SPARSE, **options)

        def cache_of(ids):
            return prefill(model, handle.new_cache() if handle else DynamicCache(config=model.config), ids)

        try:
            alone = [cache_of(ids) for ids in read]
            wanted = [answer(model, tokenizer, alone[owner], read[owner], text, ANSWER_WORDS) for owner, text in asked]
            cache = cache_of(torch.cat(read))
            held = [part.clone() for part in _contents(cache)]
            for rows in (1, 3, 8):
                given = answers(model, cache, questions, owners, ANSWER_WORDS, rows)
                assert [tokenizer.decode(one) for one in given.ids] == [one.text for one in wanted]
                assert given.steps == sum(one.steps for one in wanted) and given.seconds > 0
            assert all(torch.equal(a, b) for a, b in zip(_contents(cache), held, strict=True))
        finally:
            if handle:
                handle.remove()

    @pytest.mark.parametrize("wrong", [{"length": 0}, {"rows": 0}, {"questions": [[5], []]}, {"owners": [0]}])
    def test_wrong_input(self, pocket, wrong):
        settings = {"questions": [[5], [6]], "owners": [0, 0], "length": 1, "rows": 1} | wrong
        with pytest.raises(ValueError, match="from 1 up"):
            answers(pocket[0], DynamicCache(), **settings)


def _contents(cache):
    for layer in cache.layers:
        yield from layer.method.read_all() if hasattr(layer, "method") else (layer.keys, layer.values)


class TestStress:
    def model(self, family):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = AutoModelForCausalLM.from_config(tiny_config(family, initializer_range=0.1, head_dim=16)).eval()
            for name, weight in model.named_parameters():
                if "k_norm" in name or "q_norm" in name:
                    weight.data.uniform_(0.5, 2.0)
                if name.endswith("bias"):
                    weight.data.normal_()
        return model

    def keys(self, model, ids):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache).logits
        return logits, [layer.keys for layer in cache.layers]

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_scale_changes_keys_and_not_one_logit(self, family):
        ids, plain = prompt(tokens=60), self.model(family)
        stressed = copy.deepcopy(plain)
        apply_stress(stressed, "scale", ids)
        (logits, keys), (after, large) = self.keys(plain, ids), self.keys(stressed, ids)
        assert torch.equal(after, logits)
        for small, big in zip(keys[:1], large[:1]):
            ratio = big.std(dim=(0, 2)) / small.std(dim=(0, 2))
            outliers = torch.isclose(ratio, torch.tensor(FACTOR), rtol=1e-3)
            assert (outliers.sum(-1) == 4).all() and torch.isclose(ratio[~outliers], torch.tensor(1.0)).all()
            slow = outliers.view(len(outliers), 2, -1)  # both channels of a pair, out of the slower half
            assert torch.equal(slow[:, 0], slow[:, 1]) and not slow[..., : slow.shape[-1] // 2].any()

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_offset_shifts_keys_and_leaves_attention(self, family):
        ids, plain = prompt(tokens=60), self.model(family)
        plain.model.rotary_emb.inv_freq[-1] = 0.0
        stressed = copy.deepcopy(plain)
        apply_stress(stressed, "offset", ids)
        (logits, keys), (after, large) = self.keys(plain, ids), self.keys(stressed, ids)
        assert (after - logits).abs().max() < 1e-4 * logits.abs().max()
        moved = (large[0] - keys[0]).mean(dim=(0, 2)) / keys[0].std(dim=(0, 2))
        assert torch.allclose(moved[:, [-1, keys[0].shape[-1] // 2 - 1]], torch.tensor(SHIFT), rtol=1e-3)

    def test_what_changes_nothing_changes_nothing(self):
        model = self.model("llama")
        before = weight_hash(model)
        for stress in ("none", "rivals"):
            apply_stress(model, stress, prompt())
        assert weight_hash(model) == before
        apply_stress(model, "scale", prompt())
        assert weight_hash(model) != before

    def test_other_layouts_are_refused(self):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt_neox"))
        with pytest.raises(ValueError, match="no q_proj"):
            apply_stress(model, "scale", prompt())
        with pytest.raises(ValueError, match="8 channels are too small"):
            apply_stress(llama(), "scale", prompt())


def test_a_digest_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="oracle"):
        scout_hf.patch(llama(), digest="orakel")
