"""Selection of one layer: keeps the digests of its whole blocks and chooses the top-k within the budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from scout_hf.config import ScoutConfig
from scout_hf.kernels.cpu import BlockLists, ByMass, pages
from scout_hf.kernels.cpu.protocols import PagedStore
from scout_hf.kernels.device import find_kernels_for
from scout_hf.selection.auto import digest_for
from scout_hf.selection.budget import budgeted
from scout_hf.selection.coarse import coarse_for
from scout_hf.selection.coded import Coded
from scout_hf.selection.digest import Digest, make_digest
from scout_hf.selection.group_mass import keep_mass, mean_share, recent_mass
from scout_hf.selection.pick import Pick, choose, everything, pack_lists
from scout_hf.selection.query_power import power_of
from scout_hf.selection.reading import Blocks, in_parts, read_parts, read_sample
from scout_hf.selection.table import DigestTable
from scout_hf.stores.state import State, count_in, flag_in, maybe_count_in, maybe_tensor_in, number_in

if TYPE_CHECKING:
    from scout_hf.step import Step

# Tokens that are attended with ``mass`` in any case: heads that seem to look at few blocks are those whose estimate is
# least certain.
MASS_FLOOR = 256


class Selector:
    """Digests and budget of one layer.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
    keys : Tensor (batch, kv_heads, tokens, head_dim)
        The layer's first keys, for size, dtype and device. Not stored.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.selection import Selector
    >>> keys = torch.randn(1, 2, 64, 32)
    >>> selector = Selector(ScoutConfig(block_size=16), 0, keys)
    >>> selector.extend(keys, None)
    >>> selector.blocks
    4
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"budget", "mass", "block_size", "sinks", "window", "dense_layers", "digest", "gpu_kernels"}
    )
    """Fields of ``ScoutConfig`` that have an effect on a selection."""

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        self.config, self.dense = config, config.is_dense(layer_idx)
        digest, self._kernels = make_digest(digest_for(config, keys)), find_kernels_for(config.gpu_kernels, keys)
        self._coded = Coded(digest, DigestTable())
        self._early: int | None = None  # first block encoded before its padding mask was known
        self._query_power: torch.Tensor | None = None
        self._scale = keys.shape[-1] ** -0.5
        # No view: it would hold the first prompt's keys.
        self._like = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]))

    @property
    def coded(self) -> Coded:
        """The codes of all encoded blocks, with the digest that encodes them."""
        return self._coded

    @property
    def digest(self) -> Digest:
        """The digest that encodes blocks."""
        return self.coded.digest

    @property
    def table(self) -> DigestTable:
        """The codes of all encoded blocks."""
        return self.coded.table

    @property
    def blocks(self) -> int:
        """Blocks that have a digest."""
        return self.table.blocks

    @property
    def used_bytes(self) -> int:
        """Bytes of all codes."""
        return self.table.used_bytes

    def observe(self, query: torch.Tensor, kv_heads: int, scale: float, mask: torch.Tensor | None) -> None:
        """Measure the mean square of a prompt's queries per channel, for digests that are fitted.

        Parameters
        ----------
        query : Tensor (batch, query_heads, tokens, head_dim)
        kv_heads : int
        scale : float
            Factor on q.k before the softmax.
        mask : Tensor (batch, tokens so far) of bool, or None
            False for padding.
        """
        self._scale = scale
        if self.dense or not self.digest.needs_fit:
            return
        power = power_of(query, kv_heads, mask)
        self._query_power = power if bool(power.isfinite().all()) else None

    def extend(
        self,
        keys: torch.Tensor,
        padding_mask: torch.Tensor | None,
        past: Callable[[], tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    ) -> None:
        """Encode further whole blocks.

        Parameters
        ----------
        keys : Tensor (batch, kv_heads, n * block_size, head_dim)
        padding_mask : Tensor (batch, n, block_size) of bool, or None
        past : callable, or None
            Returns the keys and padding mask of all earlier blocks; called if the digest must be fitted again.
        """
        if self.dense:
            return
        keys = keys.unflatten(2, (-1, self.config.block_size))
        if not self._coded.fit_is_due(keys.shape[2], self.config.block_size) or (self.blocks and past is None):
            return self._append(in_parts(keys, padding_mask), self.blocks + keys.shape[2])
        if self.blocks and past is not None:
            old, mask = past()
            keys = torch.cat([old.unflatten(2, (-1, self.config.block_size)).to(keys.device), keys], dim=2)
            padding_mask = None if padding_mask is None or mask is None else torch.cat([mask, padding_mask], dim=1)
        self._fit_again((keys, padding_mask), in_parts(keys, padding_mask), keys.shape[2])

    def _append(self, parts: Iterable[Blocks], last: int) -> None:
        """Encode the blocks from ``self.blocks`` to ``last``."""
        first = self.blocks
        try:
            for part in parts:
                codes = self._encode(*part)
                # One table at once: memory of many that were too small does not come back to the system.
                self.table.append(codes, last - self.blocks - codes.shape[2])
        except BaseException:
            self.table.crop(first)
            raise

    def _encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        codes = None if self._kernels is None else self._kernels.encode(self.digest, keys, padding_mask)
        return self.digest.encode(keys, padding_mask) if codes is None else codes

    @property
    def has_room(self) -> bool:
        """Whether the next block can be encoded by :meth:`encode_at`."""
        has_place = self.blocks < self.table.capacity
        return self.dense or (has_place and not self._coded.fit_is_due(1, self.config.block_size))

    def encode_at(self, place: torch.Tensor, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Encode one block to place ``place``, (1,) of int, that only the device knows; ``grew`` counts it.

        Arguments as in :meth:`extend`; nothing here waits for the device if the digest's ``encode`` does not.
        """
        if not self.dense:
            codes = self._encode(keys.unflatten(2, (1, -1)), padding_mask)
            self.table.all_codes().index_copy_(2, place.long(), codes)

    def grew(self) -> None:
        """Count the block of :meth:`encode_at`."""
        if not self.dense:
            self.table.grew(1)

    def _fit_again(self, sample: Blocks, parts: Iterable[Blocks], last: int) -> None:
        """Fit to a sample and encode all blocks again; on an error nothing has changed."""
        fresh = copy.copy(self)
        fresh._coded = Coded(copy.copy(self.digest), DigestTable())
        fresh.digest.fit(*sample, self._query_power, self._scale)
        fresh._append(parts, last)
        self._coded = fresh._coded._replace(fitted_blocks=fresh.blocks, fitted_blindly=self._query_power is None)

    def extend_from(self, store: PagedStore, last: int, padding_mask: torch.Tensor | None) -> None:
        """Encode the whole blocks of a PagedKV before block ``last`` that are not encoded yet.

        ``padding_mask`` is (batch, tokens) of bool or None.
        """
        if self._early is not None:
            self._review_early(self._early, padding_mask)
        self._extend_from(store, last, padding_mask)

    def extend_early(self, store: PagedStore, last: int) -> None:
        """As ``extend_from``, but outside a forward pass: padding mask and queries are not known yet.

        The next ``extend_from`` encodes those blocks again if padding or queries would have changed their codes.
        """
        if not self.dense:
            first = 0 if self._coded.fit_is_due(last - self.blocks, self.config.block_size) else self.blocks
            self._early = first if self._early is None else min(first, self._early)
            self._extend_from(store, last, None)

    def _review_early(self, first: int, padding_mask: torch.Tensor | None) -> None:
        made = slice(first * self.config.block_size, self.blocks * self.config.block_size)
        blind = not first and self._coded.fitted_blindly and self._query_power is not None
        if blind or (padding_mask is not None and not bool(padding_mask[:, made].all())):
            self.crop(first)
        self._early = None

    def _extend_from(self, store: PagedStore, last: int, padding_mask: torch.Tensor | None) -> None:
        first, size = self.blocks, self.config.block_size
        if self.dense or first >= last:
            return
        library, native = store.library, store.native() if self.digest.native == "minmax" else None
        covers = padding_mask is None or (padding_mask.is_cpu and padding_mask.stride(1) == 1)
        if padding_mask is not None:
            covers = covers and len(padding_mask) == store.batch and padding_mask.shape[1] >= last * size
        if library is not None and native is not None and covers:
            store.touch(torch.arange(first, last, dtype=torch.int64, device="cpu").expand(store.batch, store.heads, -1))
            shape = torch.Size((store.batch, store.heads, last - first, 2 * store.head_dim))
            codes = self.table.reserve(shape, store.dtype, store.device)
            pages.minmax(library, native, first, last, padding_mask, codes)
            self.table.grew(last - first)
            return

        if self._coded.fit_is_due(last - first, size):
            self._fit_again(read_sample(store, last, padding_mask), read_parts(store, 0, last, padding_mask), last)
        else:
            self._append(read_parts(store, first, last, padding_mask), last)

    def lists(
        self,
        step: Step,
        query: torch.Tensor,
        store: PagedStore,
        blocks: int,
        newer: Callable[[], torch.Tensor] | None = None,
    ) -> BlockLists | None:
        """The blocks of a PagedKV to attend: the top-k of the first ``blocks`` and all newer ones; None for all.

        ``newer`` returns the keys of all tokens behind the first ``blocks``, if not all of them are in the store.
        """
        newest, count = store.blocks - blocks, self.count(step, blocks)
        if count is None:
            return None
        tail = newer or (lambda: store.read(blocks * self.config.block_size, store.length)[0])

        if self.digest.native is not None:
            mask = None if step.mask is None else step.padding(query.device)
            size, sinks = self.config.block_size, self.config.blocks(self.config.sinks)
            limits = self._limits(step, query, blocks, tail)
            most = count if isinstance(count, int) else int(count.max())
            coarse = coarse_for(self.digest, query.shape[3], blocks, most) if limits is None else None
            prepared, codes, name = self.digest.prepare(query), self.table.codes(blocks), self.digest.native
            chosen = step.backend.select(name, prepared, codes, count, sinks, newest, size, mask, limits, coarse)
            if chosen is not None:
                return chosen
        picked = self.pick(step, query, blocks, store.heads, tail)
        last = torch.arange(blocks, store.blocks, dtype=torch.int64, device=picked.ids.device)
        last = last.expand(*picked.ids.shape[:2], -1)
        ids, valid = torch.cat([picked.ids, last], dim=2), picked.valid
        return pack_lists(ids, None if valid is None else torch.cat([valid, torch.ones_like(last).bool()], dim=2))

    @property
    def by_mass(self) -> bool:
        """Whether ``config.mass`` decides how many blocks are chosen."""
        return self.config.mass is not None and self.digest.per_head

    def pick(
        self,
        step: Step,
        query: torch.Tensor,
        blocks: int,
        kv_heads: int,
        tail: Callable[[], torch.Tensor] | None = None,
        whole: bool = False,
    ) -> Pick:
        """Choose the top-k of the first ``blocks``.

        Parameters
        ----------
        step : Step
            For the context length (share budgets) and the padding mask.
        query : Tensor (batch, query_heads, 1, head_dim)
        blocks : int
            Candidate blocks; newer ones are always attended.
        kv_heads : int
        tail : callable, or None
            Returns the keys of all newer tokens, (batch, kv_heads, tokens, head_dim), whose mass counts with
            ``config.mass``; None to count only candidates.
        whole : bool
            Use up the budget, whatever ``config.mass`` is.

        Returns
        -------
        Pick
        """
        scores, count, padding_mask = self.rank(step, query, blocks, tail, whole)
        if scores is None:
            return everything(query.shape[0], kv_heads, blocks, padding_mask, query.device)
        return choose(scores, count, self.config.blocks(self.config.sinks), padding_mask, self.by_mass and not whole)

    def _limits(
        self, step: Step, query: torch.Tensor, blocks: int, tail: Callable[[], torch.Tensor] | None
    ) -> ByMass | None:
        """What ``config.mass`` asks for; None if it asks for nothing."""
        if self.config.mass is None or not self.digest.per_head:
            return None
        least = self.config.blocks(MASS_FLOOR)
        if tail is None:
            return ByMass(self.config.mass, least, None)
        keys, first = tail(), blocks * self.config.block_size
        mask = None if step.mask is None else step.mask[:, first : first + keys.shape[2]].to(keys.device)
        recent = recent_mass(query, keys, mask, self._scale) - self.digest.centre(query)
        return ByMass(self.config.mass, least, recent)

    def rank(
        self,
        step: Step,
        query: torch.Tensor,
        blocks: int,
        tail: Callable[[], torch.Tensor] | None = None,
        whole: bool = False,
    ) -> tuple[torch.Tensor | None, int | torch.Tensor, torch.Tensor | None]:
        """Scores of the first ``blocks`` blocks, and the top-k size; arguments as in :meth:`pick`.

        Returns
        -------
        scores : Tensor (batch, kv_heads, blocks) of float32, or None if all blocks are chosen
        count : int or Tensor (batch,)
        padding_mask : Tensor (batch, blocks) of bool, or None
        """
        padding_mask = None
        if step.mask is not None:
            padding_mask = step.block_mask(self.config.block_size, query.device)[:, :blocks]
        count = self.count(step, blocks)
        if count is None:
            return None, blocks, padding_mask
        limits = None if whole or self.config.mass is None else self._limits(step, query, blocks, tail)
        codes = self.coded.table.codes(blocks)
        return self.scores(step, query, codes, padding_mask, limits=limits), count, padding_mask

    def count(self, step: Step, blocks: int) -> int | torch.Tensor | None:
        """The top-k size among the first ``blocks``, for all rows or for each; None if all are chosen."""
        if self.dense or step.attends_all or not blocks:
            return None
        key = "budgeted", blocks
        count = step.shared.get(key)
        if count is None:
            count = step.shared[key] = budgeted(self.config, step, blocks)
        return None if isinstance(count, int) and count >= blocks and not self.by_mass else count

    def scores(
        self,
        step: Step,
        query: torch.Tensor,
        codes: torch.Tensor,
        padding_mask: torch.Tensor | None,
        filled: torch.Tensor | None = None,
        limits: ByMass | None = None,
    ) -> torch.Tensor:
        """Scores (batch, kv_heads, blocks) of float32; undefined from block ``filled`` (1,) on, if that is given.

        ``padding_mask`` is (batch, blocks) of bool or None, False for blocks of only padding. With
        ``limits``, blocks that are not needed get -inf.
        """
        digest, size, scores, shares_of = self.coded.digest, self.config.block_size, None, mean_share
        if digest.native and self._kernels is not None:
            scores = self._kernels.score(digest.native, digest.prepare(query), codes, size, count=filled)
            if scores is not None:
                filled, shares_of = None, self._kernels.mean_share  # it has written -inf from there on
        elif digest.native:
            scores = step.backend.score(digest.native, digest.prepare(query), codes, block_size=size)
        scores = digest.score(query, codes) if scores is None else scores
        if not digest.per_head:
            return scores
        if filled is not None:
            places = torch.arange(codes.shape[2], dtype=filled.dtype, device=filled.device)
            scores = scores.masked_fill(places >= filled, -torch.inf)
        shares = shares_of(scores, codes.shape[1], padding_mask, None if limits is None else limits.recent)
        sinks = self.config.blocks(self.config.sinks)
        return shares if limits is None else keep_mass(shares, limits.mass, limits.least, padding_mask, sinks)

    def crop(self, blocks: int) -> None:
        """Drop the codes of blocks from ``blocks`` on."""
        self.table.crop(blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        self.table.select_rows(rows)
        if self.blocks and self.digest.needs_fit:
            self.digest.select_rows(rows)
        if self._query_power is not None:
            self._query_power = self._query_power[rows.to(self._query_power.device)]

    def learn_from(self, others: Sequence[Selector | None], rows: Sequence[int]) -> None:
        """Take what others measured of queries: row ``i`` from row ``rows[i]`` of ``others[i]``."""
        known = [other for other in others if other is not None]
        self._scale = known[0]._scale if known else self._scale
        powers = [other._query_power for other in known]
        if len(known) == len(others) and all(power is not None for power in powers):
            self._query_power = torch.cat(
                [power[row : row + 1] for power, row in zip(powers, rows) if power is not None]
            )

    def state_dict(self) -> State:
        """Codes and what they were made with, as views that are valid until the next change."""
        coded = self._coded
        return {
            "digest": coded.digest.name,
            "constants": coded.digest.state_dict(),
            "codes": coded.table.codes() if coded.table.blocks else None,
            "fitted_blocks": coded.fitted_blocks,
            "fitted_blindly": coded.fitted_blindly,
            "early": self._early,
            "query_power": self._query_power,
            "scale": self._scale,
        }

    def load_state_dict(self, state: State, batch: int, heads: int, blocks: int, device: torch.device) -> None:
        """Take what :meth:`state_dict` gave; without codes if those are of another digest.

        ``batch`` rows of ``heads`` KV heads, of which at most ``blocks`` have codes, on ``device``. SessionError if it
        does not fit.
        """
        dim = self._like.shape[3]
        power, scale = maybe_tensor_in(state, "query_power", (batch, heads, dim)), number_in(state, "scale")
        early, fitted = maybe_count_in(state, "early", blocks), count_in(state, "fitted_blocks")
        blindly, coded = flag_in(state, "fitted_blindly"), self._coded
        if state.get("digest") == self.digest.name and not self.dense:
            coded = coded.loaded(state, self._like, self.config.block_size, batch, blocks, device)
            coded = coded._replace(fitted_blocks=fitted, fitted_blindly=blindly)
        self._coded, self._early, self._scale = coded, early if coded.table.blocks else None, scale
        self._query_power = None if power is None else power.to(device, copy=True)

    def fork(self) -> Selector:
        """An independent copy."""
        twin = object.__new__(Selector)
        coded = self._coded._replace(digest=copy.copy(self.digest), table=self.table.fork())
        twin.__dict__.update(self.__dict__, _coded=coded)
        return twin
