"""An error in the middle of a change: forks are untouched, and the cache works as before or refuses to be used."""

import asyncio
import contextlib
import copy
import threading

import pytest
import torch

import scout_hf
from scout_hf.cache_layer import ScoutLayer
from scout_hf.errors import RowsError
from scout_hf.stores.host import PagedKV
from scout_hf.stores.page_table import PageTable
from scout_hf.stores.pages import PagePool
from scout_hf.stores.resident_slots import ResidentSlots
from tests.integration.common import ONE_TIER, TOLERANCE, TWO_TIERS, llama, prompt
from tests.integration.disturbances import raise_once
from tests.unit.worlds import CROP_TAKES_LENGTH

ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
TIERS = pytest.mark.parametrize("tiers", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
IDS = prompt(2, 80)


def planted(error):
    def fail(*args, **kwargs):
        raise error("planted")

    return fail


@pytest.fixture
def world(tiers):
    """A patched model, a cache of 45 tokens, and what it says from there on."""
    model = llama()
    with scout_hf.patch(model, **tiers) as handle, torch.no_grad():
        expected = [go_on(model, handle.new_cache(), rows) for rows in (IDS, IDS[[1, 1]])]
        cache = handle.new_cache()
        model(IDS[:, :45], past_key_values=cache)
        yield model, cache, expected


def go_on(model, cache, ids=IDS) -> torch.Tensor:
    """Logits of tokens 45 to 60, the first ones as a turn."""
    with torch.no_grad():
        if cache.get_seq_length() < 45:
            model(ids[:, cache.get_seq_length() : 45], past_key_values=cache)
        found = [model(ids[:, 45:52], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(52, 60)]
    return torch.cat(found, dim=1)


def crop(cache, length):
    cache.crop(length if CROP_TAKES_LENGTH else length - cache.get_seq_length())


def assert_refuses(model, cache):
    for use in (
        lambda: go_on(model, cache),
        lambda: cache.fork(),
        lambda: crop(cache, 3),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.layers[0].keys,
        lambda: list(cache),
        lambda: cache.to_dynamic(),
        lambda: cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0),
    ):
        with pytest.raises(scout_hf.CacheStateError, match=r"reset\(\).*new ScoutCache.*fork"):
            use()


# -- small inputs, one by one -----------------------------------------------------------------------------------------


@ERRORS
@pytest.mark.parametrize("after", ["allocate", "addresses"])
def test_a_table_that_grows_has_addresses_for_all_its_pages(monkeypatch, error, after):
    """Block count, page numbers and addresses change together: nothing is written where no page is."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 40, 16)
    store = PagedKV(1, 2, 16, 8, torch.float32, "cpu")
    store.append(keys[:, :, :20], values[:, :, :20])
    with monkeypatch.context() as broken, pytest.raises(error):
        real = getattr(PagePool, after)
        broken.setattr(PagePool, after, lambda *args: [real(*args), planted(error)()])
        store.append(keys[:, :, 20:], values[:, :, 20:])
    assert store.length == 20
    store.append(keys[:, :, 20:], values[:, :, 20:])
    for held, given in zip(store.read(0, 40), (keys, values)):
        assert torch.equal(held, given)


@ERRORS
def test_pages_are_described_to_native_code_again_after_an_error(monkeypatch, error):
    store = PagedKV(1, 2, 16, 8, torch.float32, "cpu")
    if store.library is None:
        pytest.skip("no native library")
    keys, values = torch.randn(2, 1, 2, 200, 16)
    store.append(keys[:, :, :20], values[:, :, :20])
    twin = store.fork()  # describes its pages again
    with monkeypatch.context() as broken, pytest.raises(error):
        broken.setattr("scout_hf.stores.host.address", planted(error))
        twin.native()
    for held, given in zip(twin.read(0, 20), (keys, values)):
        assert torch.equal(held, given[:, :, :20])


@ERRORS
@pytest.mark.parametrize("change", [lambda t: t.truncate(1), lambda t: t.select_rows(torch.tensor([1, 1]))])
def test_pages_of_a_fork_are_never_given_back_twice(monkeypatch, error, change):
    pool = PagePool((4,), torch.float32, torch.device("cpu"))
    mine = PageTable(pool, 2)
    pages = mine.extend(3).flatten().tolist()
    other = mine.fork()
    with monkeypatch.context() as broken, pytest.raises(error):
        real = PagePool._recycle
        broken.setattr(PagePool, "_recycle", lambda *args: [real(*args), planted(error)()])
        change(mine)
    del mine
    given = [int(pool.allocate(1)) for _ in range(8)]
    assert not set(given) & set(pages) and other.ids.flatten().tolist() == pages


@ERRORS
def test_the_number_and_the_address_of_a_page_change_together(monkeypatch, error):
    pool = PagePool((4,), torch.float32, torch.device("cpu"))
    mine = PageTable(pool, 2)
    mine.extend(3)
    other = mine.fork()
    with monkeypatch.context() as broken, pytest.raises(error):
        broken.setattr(PagePool, "addresses", planted(error))
        mine.own_last()
    for table in (mine, other):
        assert torch.equal(table.addresses, pool.addresses(table.ids))


def test_slots_name_nothing_that_they_do_not_hold(monkeypatch):
    torch.manual_seed(0)
    host = PagedKV(1, 2, 16, 8, torch.float32, "cpu")
    host.append(*torch.randn(2, 1, 2, 64, 16))
    slots = ResidentSlots(1, 2, 3, 8, 16, torch.float32, "cpu")
    ids = torch.arange(8).expand(1, 2, 8)
    slots.load(ids, torch.ones_like(ids, dtype=torch.bool), host)
    before = [part.clone() for part in slots.content()]
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(PagedKV, "gather", planted(MemoryError))
        slots.load(ids.flip(2), torch.ones_like(ids, dtype=torch.bool), host)
    named = slots.ids[:, :, : slots.filled] >= 0
    assert torch.equal(slots.ids[:, :, : slots.filled][named], ids[:, :, :3][named])
    assert all(torch.equal(now, then) for now, then in zip(slots.content(), before))


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [TWO_TIERS], ids=["two tiers"])
def test_a_turn_that_finds_no_memory_for_residents(monkeypatch, world):
    """Was off by a third of the logits, and said that it was exact."""
    model, cache, (expected, _) = world
    cache.reset()
    with torch.no_grad():
        for at in range(0, 45, 5):  # less than a block at a time: nobody has chosen residents yet
            model(IDS[:, at : at + 5], past_key_values=cache)
        with monkeypatch.context() as broken, pytest.raises(MemoryError):
            broken.setattr("scout_hf.stores.resident_slots._fetch", planted(MemoryError))
            model(IDS[:, 45:60], past_key_values=cache)
        assert cache.get_seq_length() == 45
        got = [model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(45, 60)]
    assert (torch.cat(got, dim=1) - expected).abs().max() <= TOLERANCE


@ERRORS
@TIERS
def test_a_crop_that_fails_in_a_table_leaves_forks_alone(monkeypatch, world, error):
    model, cache, (expected, _) = world
    twin = cache.fork()
    with monkeypatch.context() as broken, pytest.raises(error):
        real = PagePool._recycle
        broken.setattr(PagePool, "_recycle", lambda *args: [real(*args), planted(error)()])
        crop(cache, 9)
    assert_refuses(model, cache)
    del cache
    others = [scout_hf.ScoutCache(model.config, twin.scout_config) for _ in range(2)]
    for other in others:
        go_on(model, other, IDS.flip(1))
    assert (go_on(model, twin) - expected).abs().max() <= TOLERANCE


OPERATIONS = {
    "crop": lambda cache: crop(cache, 21),
    "select_rows, reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select_rows, repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select_rows, select": lambda cache: cache.batch_select_indices(torch.tensor([True, False])),
}


@ERRORS
@TIERS
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_ends_between_two_layers_is_told_of_at_every_use(monkeypatch, world, name, error):
    model, cache, (expected, _) = world
    twin, method = cache.fork(), cache.layers[2].method
    with monkeypatch.context() as broken, pytest.raises(error):
        broken.setattr(method, name.split(",")[0], planted(error), raising=True)
        OPERATIONS[name](cache)
    assert_refuses(model, cache)
    assert (go_on(model, twin) - expected).abs().max() <= TOLERANCE
    cache.reset()
    assert (go_on(model, cache) - expected).abs().max() <= TOLERANCE


SELECTED, REORDERED, REPEATED = "batch_select_indices", "reorder_cache", "batch_repeat_interleave"
WRONG_ROWS = [
    *(
        (name, rows)
        for name in (SELECTED, REORDERED)
        for rows in ([0, 2], [-3, 0], [0.0, 1.0], [[0, 1]], 1, None, "01")
    ),
    *((SELECTED, rows) for rows in ([True] * 3, torch.tensor([0, 1], dtype=torch.uint8))),
    *((REORDERED, rows) for rows in ([-1, 0], [True, True])),
    *((REPEATED, times) for times in (-1, 2.5, "2", None, torch.tensor([1, 2]))),
]


@TIERS
@pytest.mark.parametrize("name, rows", WRONG_ROWS, ids=str)
def test_wrong_rows_change_nothing(world, name, rows):
    model, cache, (expected, _) = world
    with pytest.raises(RowsError, match=rf"^{name}\(\) got .*Nothing was changed"):
        getattr(cache, name)(rows)
    assert (go_on(model, cache) - expected).abs().max() <= TOLERANCE


@TIERS
@pytest.mark.parametrize("rows", [[-1, -1], [1, 1], torch.tensor([1, 1], dtype=torch.int32)], ids=str)
def test_rows_are_named_as_in_stock(world, rows):
    model, cache, (_, expected) = world
    cache.batch_select_indices(rows)
    assert (go_on(model, cache, IDS[[1, 1]]) - expected).abs().max() <= TOLERANCE


@TIERS
def test_rows_can_be_chosen_after_a_pass_that_failed(monkeypatch, world):
    model, cache, (_, expected) = world
    raise_once(monkeypatch, model.model.layers[2].mlp, 0)
    with pytest.raises(Exception, match="planted"):
        go_on(model, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert (go_on(model, cache, IDS[[1, 1]]) - expected).abs().max() <= TOLERANCE


@TIERS
@pytest.mark.parametrize(
    "use",
    [
        lambda cache: crop(cache, 44),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.layers[1].keys,
        lambda cache: cache.fork(),
    ],
)
def test_whatever_is_done_first_takes_an_interrupted_pass_back(world, use):
    model, cache, _ = world
    hook = model.model.layers[2].mlp.register_forward_pre_hook(planted(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(IDS[:, 45:60], past_key_values=cache)
    hook.remove()
    use(cache)
    assert {layer.method.length for layer in cache.layers} <= {44, 45}


@TIERS
def test_a_way_back_that_fails_is_told_of(monkeypatch, world):
    model, cache, (expected, _) = world
    twin = cache.fork()
    with monkeypatch.context() as broken, pytest.raises(Exception, match="planted"), torch.no_grad():
        raise_once(broken, model.model.layers[2].mlp, 0)
        real, calls = ScoutLayer.rollback, []
        rollback = lambda layer, mark: planted(MemoryError)() if calls else calls.append(real(layer, mark))  # noqa: E731
        broken.setattr(ScoutLayer, "rollback", rollback)
        with pytest.warns(UserWarning, match="always_call"):
            model(IDS[:, 45:60], past_key_values=cache)
    assert_refuses(model, cache)
    assert (go_on(model, twin) - expected).abs().max() <= TOLERANCE


@TIERS
def test_an_update_that_fails_half_way(monkeypatch, world):
    """A model that is not patched brings layer after layer: what other layers have cannot be taken back."""
    model, cache, _ = world
    keys = torch.zeros(2, 2, 9, 8)
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(PagedKV, "append", planted(MemoryError))
        cache.update(keys, keys, 1)
    assert_refuses(model, cache)


def leave_a_pass_behind(model, cache):
    """A thread is cancelled in the middle of a pass, and ends."""
    hook = model.model.layers[2].mlp.register_forward_pre_hook(planted(asyncio.CancelledError))

    def work():
        with contextlib.suppress(asyncio.CancelledError):
            go_on(model, cache)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    hook.remove()


@TIERS
def test_a_pass_that_a_thread_left_behind_is_taken_back_by_another(world):
    model, cache, (expected, _) = world
    leave_a_pass_behind(model, cache)
    assert cache.layers[0].method.length == 52
    assert (go_on(model, cache) - expected).abs().max() <= TOLERANCE


@TIERS
def test_a_cache_in_a_pass_of_another_thread_serves_no_second_one(world):
    model, cache, (expected, _) = world
    inside, outside = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        outside.wait(30)

    hook = model.model.layers[2].mlp.register_forward_pre_hook(wait)
    found = []
    thread = threading.Thread(target=lambda: found.append(go_on(model, cache)))
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(scout_hf.CacheStateError, match="another thread"):
            go_on(model, cache)
    finally:
        hook.remove()
        outside.set()
        thread.join()
    assert (found[0] - expected).abs().max() <= TOLERANCE


CHANGES = {
    "fork()": lambda cache: cache.fork(),
    "deepcopy": lambda cache: copy.deepcopy(cache),
    "crop()": lambda cache: crop(cache, 44),
    "reorder_cache()": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "batch_repeat_interleave()": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices()": lambda cache: cache.batch_select_indices([1]),
    "reset()": lambda cache: cache.reset(),
    "crop() of a layer": lambda cache: cache.layers[0].crop(-1),
    "reorder_cache() of a layer": lambda cache: cache.layers[0].reorder_cache(torch.tensor([1, 1])),
    "batch_repeat_interleave() of a layer": lambda cache: cache.layers[0].batch_repeat_interleave(2),
    "batch_select_indices() of a layer": lambda cache: cache.layers[0].batch_select_indices([1]),
    "reset() of a layer": lambda cache: cache.layers[0].reset(),
    "copy of a layer": lambda cache: copy.copy(cache.layers[0]),
}


@TIERS
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("thread", ["this thread", "another thread"])
@pytest.mark.thin(2)
def test_nothing_is_changed_in_the_middle_of_a_pass(world, change, thread):
    model, cache, (expected, _) = world
    told = []

    def ask():
        try:
            CHANGES[change](cache)
        except scout_hf.CacheStateError as error:
            told.append(str(error))

    def in_a_thread():
        other = threading.Thread(target=ask)
        other.start()
        other.join()

    hook = model.model.layers[2].mlp.register_forward_pre_hook(
        lambda *_: ask() if thread == "this thread" else in_a_thread()
    )
    found = go_on(model, cache)
    hook.remove()
    assert (found - expected).abs().max() <= TOLERANCE
    # A turn and eight steps.
    assert len(told) == 9 and all("forward pass" in each and "before or after" in each for each in told)
    CHANGES[change](cache)


@TIERS
def test_no_tokens_are_added_in_the_middle_of_another_threads_pass(world):
    model, cache, (expected, _) = world
    told, keys = [], torch.zeros(2, 2, 1, 8)

    def ask():
        try:
            cache.update(keys, keys, 1)
        except scout_hf.CacheStateError as error:
            told.append(str(error))

    def in_a_thread(*_):
        other = threading.Thread(target=ask)
        other.start()
        other.join()

    hook = model.model.layers[2].mlp.register_forward_pre_hook(in_a_thread)
    found = go_on(model, cache)
    hook.remove()
    assert (found - expected).abs().max() <= TOLERANCE
    assert len(told) == 9 and "another thread" in told[0]


@TIERS
def test_tokens_added_after_a_pass_that_a_thread_left_behind(world):
    model, cache, _ = world
    leave_a_pass_behind(model, cache)
    keys = torch.zeros(2, 2, 1, 8)
    for index in range(len(cache.layers)):
        assert cache.update(keys, keys, index)[0].shape[2] == 46


@TIERS
def test_a_bigger_model_with_a_cache_of_its_own_inside_a_pass(tiers):
    """A draft made in a hook, by a model that is not patched and has more layers."""
    model, bigger = llama(num_hidden_layers=2), llama()
    with torch.no_grad(), scout_hf.patch(model, **tiers) as handle:
        expected = model(IDS).logits
        inner = scout_hf.ScoutCache(bigger.config, **tiers)

        def draft(*_):
            bigger(IDS[:, :9], past_key_values=inner)

        hook = model.model.layers[1].register_forward_pre_hook(draft)
        found = model(IDS, past_key_values=handle.new_cache()).logits
        hook.remove()
    assert (found - expected).abs().max() <= TOLERANCE
    assert {layer.get_seq_length() for layer in inner.layers} == {9}
