"""``patch(draft=...)``: sparse steps draft, an exact pass checks, and no token or logit differs from exact decoding."""

import collections
import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import scout_hf
from scout_hf import CACHE, ConfigError, ScoutCache
from scout_hf.auto_draft import AutoDraft
from scout_hf.drafting import calls, picks, rounds
from scout_hf.drafting.rounds import Round
from scout_hf.step import Role
from tests.integration.common import MODES, assert_close, left_padded, llama, one_llama, prompt, run, stock_mode
from tests.patches.tiny import VOCAB, tiny_model

SPARSE = {"block_size": 8, "window": 8, "budget": 24}
TIERS = {
    "one tier": SPARSE,
    "two tiers": SPARSE | {"split": "cpu", "resident": 16},
    "real query": SPARSE | {"split": "cpu", "resident": 16, "layer_ahead": False},
    "dense": SPARSE | {"method": "dense"},
    "kvpr": SPARSE | {"method": "kvpr", "method_options": {"share": 0.5}},
}
INPUTS = {"one row": prompt(1, 90), "batch": prompt(3, 90), "padded": left_padded(0, 13, 40, tokens=90)}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """As on a machine where drafts always pay; tiny models give no times to go by."""
    monkeypatch.setattr(AutoDraft, "length", lambda pace, most: max(0, most))


def foresee(monkeypatch, sequences, wrong=0.3):
    """Drafts that are right but for a share of them, spread over rows and positions."""
    real, random = picks.Picks.pick, torch.Generator().manual_seed(0)

    def pick(self, ids, logits):
        found, at = real(self, ids, logits), ids.shape[1]
        if at >= sequences.shape[1]:
            return found
        miss = torch.rand(len(ids), 1, generator=random) < wrong
        return torch.where(miss, (sequences[:, at : at + 1] + 1) % 3 + 4, sequences[:, at : at + 1])

    monkeypatch.setattr(picks.Picks, "pick", pick)


def exact(model, inputs, new=24, **options):
    with scout_hf.patch(model, budget=None, block_size=8, layer_ahead=False):
        return run(model, inputs, new, **options)


# -- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
@pytest.mark.thin(3)
def test_tokens_and_logits_are_those_of_exact_decoding(options, inputs, k, monkeypatch):
    model = one_llama()
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences, wrong=0.15)
    with scout_hf.patch(model, draft=k, **options) as handle:
        cache = handle.new_cache()
        assert_close(run(model, inputs, 24, **{CACHE: cache}), wanted)
        stats = handle.stats()
        # As the loop leaves a cache without drafts, and all of it exact.
        held = cache.log.held(cache.get_seq_length(), cache.guard.changes)
        assert held.ids.shape[1] == held.exact == 90 + 23 and torch.equal(held.ids, wanted.sequences[:, :-1])
        assert handle.exact and stats.exact and stats.prefill_tokens == 90
    assert 0 < stats.accepted_tokens < stats.drafted_tokens and stats.steps >= stats.drafted_tokens
    assert stats.attended_tokens < 0.75 * stats.context_tokens
    assert 24 - stats.accepted_tokens - 1 <= stats.draft_checks + 1
    assert stats.acceptance == stats.accepted_tokens / stats.drafted_tokens
    assert stats.tokens_per_exact_pass == pytest.approx(1 + stats.accepted_tokens / stats.draft_checks)
    assert f"{stats.accepted_tokens} of {stats.drafted_tokens} accepted (" in str(stats)


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "granite", "phi3", "cohere", "glm4"])
@pytest.mark.thin(2)
def test_families(family, options):
    model = tiny_model(family)
    inputs = left_padded(0, 9, tokens=70)
    wanted = run(model, inputs, 12)
    with scout_hf.patch(model, draft=4, **options) as handle:
        assert_close(run(model, inputs, 12), wanted, 5e-6)
        assert handle.stats().draft_checks


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_that_of_the_unpatched_model(mode):
    """Also where there are no drafts: beams, prompt lookup, hidden states."""
    (inputs, options), model = MODES[mode], one_llama()
    with scout_hf.patch(model, draft=3, **SPARSE) as handle:
        torch.manual_seed(0)
        assert_close(run(model, inputs, **options), stock_mode(mode))
        stats = handle.stats()
    assert stats.exact
    without = {"beam", "beam sampling", "several beams", "prompt lookup", "hidden states"}
    assert bool(stats.draft_checks) == (mode not in without)
    assert any("none for a call with" in note for note in stats.notes) == (mode in without)


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_no_draft_is_longer_than_the_text(new):
    model, inputs = one_llama(), prompt(1, 60)
    with scout_hf.patch(model, draft=8, **SPARSE) as handle:
        assert_close(run(model, inputs, new), exact_of(inputs, new))
        stats = handle.stats()
        assert stats.drafted_tokens <= max(0, new - 2) * max(1, stats.draft_checks)


def exact_of(inputs, new):
    return run(llama(), inputs, new)


# -- the end of a text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("at", range(3, 12))
def test_an_end_inside_a_draft(at, rows, monkeypatch):
    """Wherever it falls among accepted drafts; rows that have ended go on with padding."""
    model, inputs = one_llama(), prompt(rows, 60)
    longest = exact(model, inputs, 20).sequences
    ends = {"eos_token_id": sorted({int(longest[0, 60 + at]), int(longest[-1, 60 + at + 4])}), "pad_token_id": 2}
    options = ends | {"min_new_tokens": None, "output_scores": True}
    wanted = exact(model, inputs, 20, **options)
    foresee(monkeypatch, torch.nn.functional.pad(wanted.sequences, (0, 10), value=5), wrong=0.1)
    with scout_hf.patch(model, draft=5, **SPARSE) as handle:
        cache = handle.new_cache()
        got = run(model, inputs, 20, **options, **{CACHE: cache})
        assert handle.stats().draft_checks
    assert_close(got, wanted)
    assert len(got.scores) == len(wanted.scores) and cache.get_seq_length() == wanted.sequences.shape[1] - 1


class Processor(LogitsProcessor):
    """Remembers what it is shown, as the next two do."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.flatten().tolist())
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, stop_at):
        self.seen, self.stop_at = [], stop_at

    def __call__(self, input_ids, scores, **_):
        self.seen.append(input_ids.flatten().tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop_at, dtype=torch.bool)


class Streamer(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("stop", [None, 64, 67, 73])
def test_processors_criteria_and_streamers_see_what_they_would_see(stop, monkeypatch):
    model, inputs = one_llama(), prompt(1, 60)

    def told(model):
        processor, streamer, criterion = Processor(), Streamer(), Criterion(stop or 10_000)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[processor],
            stopping_criteria=[criterion],
            streamer=streamer,
        )
        return processor.seen, streamer.seen, criterion.seen

    wanted = told(model)
    foresee(monkeypatch, exact(model, inputs, 20).sequences)
    with scout_hf.patch(model, draft=4, **SPARSE) as handle:
        assert told(model) == wanted
        assert handle.stats().accepted_tokens
    assert wanted[1][-1] == "end" and len(wanted[0]) == (stop or 80) - 60


def letters():
    """A tokenizer of single characters."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("at", [3, 5, 8])
def test_stop_strings(at, monkeypatch):
    model, inputs, tokenizer = one_llama(), prompt(2, 60), letters()
    longest = exact(model, inputs, 20)
    stop = tokenizer.convert_ids_to_tokens(longest.sequences[0, 60 + at : 62 + at].tolist())
    options = {"stop_strings": ["".join(stop)], "tokenizer": tokenizer, "min_new_tokens": None, "pad_token_id": 2}
    wanted = exact(model, inputs, 20, **options)
    assert (wanted.sequences[0, 62 + at :] == 2).all()
    foresee(monkeypatch, longest.sequences, wrong=0.1)
    with scout_hf.patch(model, draft=3, **SPARSE) as handle:
        assert_close(run(model, inputs, 20, **options), wanted)
        assert handle.stats().accepted_tokens


# -- sampling ---------------------------------------------------------------------------------------------------------

WARM = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_a_seed_gives_the_same_text_as_without_drafts(inputs, options):
    model = one_llama()
    after = []
    for seed in range(2):
        torch.manual_seed(seed)
        wanted = exact(model, inputs, 20, **WARM)
        after.append(torch.rand(1))
        with scout_hf.patch(model, draft=3, **options) as handle:
            torch.manual_seed(seed)
            assert_close(run(model, inputs, 20, **WARM), wanted)
            after.append(torch.rand(1))
            assert handle.stats().draft_checks
        # The random numbers go on as they would.
        assert after[-1] == after[-2]


SMALL = {"vocab_size": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def small_model():
    """A model of four tokens, not too sure of any."""
    return llama(initializer_range=0.15, num_hidden_layers=2, **SMALL)


def chances(model, ids, new):
    """The probability of each continuation, by enumeration."""
    found = {}
    for more in itertools.product(range(4), repeat=new):
        whole = torch.cat([ids, torch.tensor([more])], dim=1)
        with torch.no_grad():
            logs = model(whole).logits[0].double().log_softmax(-1)
        found[more] = float(sum(logs[ids.shape[1] - 1 + at, token] for at, token in enumerate(more)).exp())
    return found


def distance(model, ids, new, calls, options):
    """Chi-square of what is drawn, over its mean, and the share of drafts that were accepted."""
    wanted = chances(model, ids, new)
    counted, rows = collections.Counter(), {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    with scout_hf.patch(model, draft=2, **options) as handle:
        torch.manual_seed(3)
        for _ in range(calls):
            got = model.generate(ids, attention_mask=torch.ones_like(ids), **rows, num_return_sequences=ROWS)
            counted.update(tuple(row[ids.shape[1] :].tolist()) for row in got)
        stats = handle.stats()
    draws = calls * ROWS
    square = sum((counted[more] - draws * p) ** 2 / (draws * p) for more, p in wanted.items())
    return square / (len(wanted) - 1), stats.acceptance


ROWS = 3
LOW = {"block_size": 8, "window": 0, "sinks": 0, "budget": 8}


def test_what_is_drawn_has_the_distribution_of_the_exact_model():
    model = small_model()
    ids = torch.randint(0, 4, (1, 60), generator=torch.Generator().manual_seed(1))
    square, acceptance = distance(model, ids, 3, 300, LOW)
    assert square < 1.5 and 0.1 < acceptance < 0.95, (square, acceptance)


def test_a_planted_bias_is_seen(monkeypatch):
    """A draft that is taken whatever the exact model thinks of it: the distribution is that of the sparse model."""
    model = small_model()
    ids = torch.randint(0, 4, (1, 60), generator=torch.Generator().manual_seed(1))
    real = Round.serve

    def biased(self):
        at, output = self.served, real(self)
        if at < self.drafts.shape[1]:
            output.logits.scatter_(2, self.drafts[:, at : at + 1, None], 1e4)
        return output

    monkeypatch.setattr(Round, "serve", biased)
    square, acceptance = distance(model, ids, 3, 300, LOW)
    assert square > 3.0 and acceptance == 1.0, (square, acceptance)


# -- planted errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_one_token_too_many_is_seen(options, monkeypatch):
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences)
    monkeypatch.setattr(Round, "fits", lambda self, ids: self.left > 0)
    with scout_hf.patch(model, draft=4, **options), pytest.raises(AssertionError):
        assert_close(run(model, inputs, 24), wanted)


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_keys_and_values_of_drafts_that_stay_are_seen(options, monkeypatch):
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences, wrong=0.0)
    real = rounds.check

    def sparse_keys(run, cache, given, drafts):
        made = real(run, cache, given, drafts)
        rounds.crop_to(cache, cache.get_seq_length() - drafts.shape[1])
        cache.role = Role.DRAFT
        for number in range(drafts.shape[1]):
            run(**rounds._continued(given, drafts[:, number : number + 1], skipped=number + 1))
        cache.role = Role.ORDINARY
        return made

    monkeypatch.setattr(calls, "check", sparse_keys)
    with scout_hf.patch(model, draft=4, **options) as handle:
        cache = handle.new_cache()
        with pytest.raises(AssertionError):
            assert_close(run(model, inputs, 24, **{CACHE: cache}), wanted)
        assert cache.log.held(cache.get_seq_length(), cache.guard.changes).exact < 100


# -- what fails in between --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 9, 12])
@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
@pytest.mark.thin(2)
def test_a_call_that_fails_leaves_a_cache_to_go_on_with(options, after, error, monkeypatch):
    """In a draft, a check or a step: the cache holds exact tokens alone, as many as the loop has come to."""
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences)
    with scout_hf.patch(model, draft=3, **options) as handle:
        cache = handle.new_cache()
        passes = itertools.count()

        def fail(*_):
            if next(passes) == after:
                raise error

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            run(model, inputs, 24, **{CACHE: cache})
        hook.remove()
        length = cache.get_seq_length()
        held = cache.log.held(length, cache.guard.changes)
        assert 90 <= length < 113 and {layer.get_seq_length() for layer in cache.layers} == {length}
        assert held.exact == length and torch.equal(held.ids, wanted.sequences[:, :length])
        assert cache.role is Role.ORDINARY
        again = {"input_ids": wanted.sequences[:, : length + 1]}
        got = run(model, again, 113 - length, **{CACHE: cache})
    assert_close(
        got, collections.namedtuple("Rest", "sequences logits")(wanted.sequences, wanted.logits[length - 89 :])
    )


def test_a_criterion_that_raises_leaves_the_tokens_that_it_saw(monkeypatch):
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences, wrong=0.0)

    def interrupt(ids, scores):
        if ids.shape[1] == 95:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with scout_hf.patch(model, draft=8, **SPARSE) as handle:
        cache = handle.new_cache()
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs, 24, stopping_criteria=[interrupt], **{CACHE: cache})
        assert cache.get_seq_length() == 94 and torch.equal(cache.token_ids, wanted.sequences[:, :94])


# -- beside other things ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_with_a_prefix_store(options, tmp_path):
    """Accepted tokens are exact: the store keeps them, and the next turn begins with them."""
    model, inputs = one_llama(), prompt(1, 101)
    wanted = exact(model, inputs, 30)
    turn = torch.cat([wanted.sequences, prompt(1, 20, seed=9)], dim=1)
    after = exact(model, turn)
    with scout_hf.patch(model, draft=4, store=tmp_path, **options) as handle:
        assert_close(run(model, inputs, 30), wanted)
        assert handle.stats().kept_tokens == 128
        assert_close(run(model, turn, 24), after)
        stats = handle.stats()
        assert stats.found_tokens == 128 and stats.draft_checks
    assert "generate" not in vars(model)


def test_a_conversation_in_one_cache_and_its_forks():
    model, inputs = one_llama(), prompt(2, 60)
    first = exact(model, inputs, 12)
    turn = torch.cat([first.sequences, prompt(2, 9, seed=7)], dim=1)
    turn = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    second = exact(model, turn, 12)
    with scout_hf.patch(model, draft=3, **SPARSE) as handle:
        cache = handle.new_cache()
        assert_close(run(model, inputs, 12, **{CACHE: cache}), first)
        for each in (cache.fork(), cache):
            assert_close(run(model, turn, 12, **{CACHE: each}), second)
        assert handle.stats().exact


def test_steps_outside_of_generate_are_exact():
    model, ids = one_llama(), prompt(1, 90)
    for options in TIERS.values():
        with torch.no_grad(), scout_hf.patch(model, draft=True, **options) as handle:
            cache = handle.new_cache()
            model(ids[:, :80], **{CACHE: cache})
            found = torch.cat([model(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(80, 90)], dim=1)
            stats = handle.stats()
        with torch.no_grad():
            assert (found - model(ids).logits[:, 80:]).abs().max() < 3e-6
        assert stats.exact and stats.attended_tokens == stats.context_tokens and not stats.drafted_tokens


def test_no_drafts_within_the_budget():
    model, inputs = one_llama(), prompt(1, 40)
    with scout_hf.patch(model, draft=True) as handle:
        assert_close(run(model, inputs), run(llama(), inputs))
        stats = handle.stats()
    assert stats.exact and not stats.drafted_tokens and stats.steps == 9 and stats.acceptance is None
    assert any("none within the budget of 2048 tokens" in note for note in stats.notes)
    assert "accepted" not in str(stats)


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_it_switches_off_where_it_does_not_pay_and_says_so(options, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(AutoDraft, "_best", lambda pace, most: 0)
    monkeypatch.setattr(AutoDraft, "round", slow(AutoDraft.round))
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs, 40)
    with scout_hf.patch(model, draft=True, **options) as handle:
        assert_close(run(model, inputs, 40), wanted)
        stats = handle.stats()
    assert stats.draft_checks <= 5 and stats.steps - stats.drafted_tokens > 20
    note = next(note for note in stats.notes if note.startswith("drafts: off"))
    assert "do not pay" in note and "an exact step takes" in note


def test_before_it_has_drafted_it_says_why(monkeypatch):
    monkeypatch.undo()
    with scout_hf.patch(one_llama(), draft=True, **next(iter(TIERS.values()))) as handle:
        run(handle.model, prompt(1, 90), 3)
        assert handle.stats().notes == ("drafts: none yet: exact steps are timed first",)


def slow(real):
    return lambda pace, drafts, drafting, checking: real(pace, drafts, 10.0, 10.0)


@pytest.mark.parametrize(
    "options",
    [{"method": "infinigen"}, {"method": "hgca"}, {"host_dtype": "int8"}, {"budget": None}],
    ids=lambda options: next(iter(options)),
)
def test_a_cache_without_sparse_and_exact_steps_has_no_drafts(options):
    model, inputs = one_llama(), prompt(1, 60)
    with scout_hf.patch(model, draft=True, **SPARSE) as handle:
        cache = ScoutCache(model.config, block_size=8, **options)
        run(model, inputs, **{CACHE: cache})
        stats = handle.stats()
        assert cache.get_seq_length() == 69 and not stats.drafted_tokens
        assert any(note.startswith("drafts: none for a call with a cache of") for note in stats.notes)


def test_layers_that_cannot_take_tokens_back_have_no_drafts():
    model = tiny_model("gemma3")
    inputs = prompt(1, 60)
    wanted = run(model, inputs, 12)
    with scout_hf.patch(model, draft=True, **SPARSE) as handle:
        assert_close(run(model, inputs, 12), wanted)
        assert any("not all kept" in note for note in handle.stats().notes)


def test_a_copy_drafts_for_itself_and_removal_restores_all():
    model = llama()
    before, inputs = dict(vars(model)), prompt(1, 60)
    wanted = run(model, inputs)
    handle = scout_hf.patch(model, draft=3, **SPARSE)
    twin = copy.deepcopy(model)
    assert_close(run(twin, inputs), wanted)
    assert not handle.stats().steps and twin._scout_handle.stats().draft_checks
    handle.remove()
    assert vars(model) == before
    assert_close(run(twin, inputs), wanted)
    scout_hf.unpatch(twin)
    assert vars(twin).keys() == before.keys()


def test_a_pickled_model_drafts():
    model, inputs = llama(), prompt(1, 60)
    wanted = run(model, inputs)
    with scout_hf.patch(model, draft=3, **SPARSE):
        twin = pickle.loads(pickle.dumps(model))
    assert_close(run(twin, inputs), wanted)
    assert twin._scout_handle.stats().draft_checks


def test_threads_draft_side_by_side():
    """Each call, also one inside another, has rounds of its own."""
    model = one_llama()
    inputs = [prompt(1, 60, seed) for seed in range(3)]
    wanted = [exact(model, each).sequences for each in inputs]
    seen = []

    def nested(ids, scores):
        if ids.shape[1] == 70:
            seen.append(run(model, inputs[0], 24).sequences)
        return torch.zeros(1, dtype=torch.bool)

    with scout_hf.patch(model, draft=3, **SPARSE) as handle, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda each: run(model, each, 24, stopping_criteria=[nested]).sequences, inputs))
        assert handle.stats().draft_checks
    assert (
        all(map(torch.equal, found, wanted)) and all(torch.equal(each, wanted[0]) for each in seen) and len(seen) == 3
    )


def test_under_inference_mode():
    model, inputs = one_llama(), left_padded(0, 5, tokens=60)
    wanted = exact(model, inputs)
    with torch.inference_mode(), scout_hf.patch(model, draft=3, **SPARSE):
        got = run(model, inputs, 24)
    assert_close(got, wanted)


def test_a_recall_profile_wants_sparse_steps():
    with scout_hf.patch(one_llama(), draft=3, **TIERS["two tiers"]) as handle:
        with pytest.raises(ConfigError, match="profile a patch without it"):
            handle.profile_recall([prompt(1, 60)])


def test_a_patch_that_is_removed_in_the_middle(monkeypatch):
    model, inputs = llama(), prompt(1, 60)
    wanted = run(model, inputs, 20)
    foresee(monkeypatch, wanted.sequences, wrong=0.1)
    handle = scout_hf.patch(model, draft=4, **SPARSE)

    def remove(ids, scores):
        if ids.shape[1] == 67:
            handle.remove()
        return torch.zeros(1, dtype=torch.bool)

    assert_close(run(model, inputs, 20, stopping_criteria=[remove]), wanted)


# -- what cannot be asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [0, -1, 2.5, "yes"])
def test_what_draft_takes(draft):
    with pytest.raises(ConfigError, match="draft takes True, the most tokens"):
        scout_hf.patch(one_llama(), draft=draft)


@pytest.mark.parametrize("draft", [None, False])
def test_without_drafts_nothing_is_replaced(draft):
    model = llama()
    with scout_hf.patch(model, draft=draft):
        assert not {"__call__", "generate", "_get_logits_processor"} & vars(model).keys()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"budget": None}, "budget='auto'"),
        ({"budget": 1.0}, "budget='auto'"),
        ({"method": "dense", "budget": None}, "budget='auto'"),
        ({"method": "hgca"}, "method='scout'"),
        ({"method": "infinigen"}, "method='scout'"),
        ({"host_dtype": "int8"}, "host_dtype=None"),
        ({"hand_over": "graph"}, "hand_over='flags'"),
    ],
)
def test_settings_without_a_sparse_or_an_exact_step_are_refused(options, word):
    model = llama()
    before = dict(vars(model))
    with pytest.raises(ConfigError, match="is not possible with") as error:
        scout_hf.patch(model, draft=True, **options)
    assert word in str(error.value) and vars(model) == before
