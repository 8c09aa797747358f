"""Base class of methods that keep whole blocks in host memory and the newest tokens on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial
from scout_hf.kernels.attend import attend
from scout_hf.methods.base import PAST_CHUNK_TOKENS, Method
from scout_hf.methods.host_to_device import InFlightCopy, blocks_to_device
from scout_hf.methods.streaming import Bring, PageStream, Piece
from scout_hf.step import Step
from scout_hf.stores import PagedKV, PagePool, TwoTierKV
from scout_hf.stores.state import State
from scout_hf.stores.streams import Mark

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNKS_AHEAD = 2
"""Chunks of the past that are in flight beside the one that is attended."""

ON_HOST = frozenset({"host_memory", "spill_dir"})
"""What has no effect on pages that a GPU reads."""

OFFLOADING = frozenset({"block_size", "split", "threads", "spin_us", "cpu_backend"}) | ON_HOST
SCOUTS_OWN = ("host_dtype", "monitor", "digest", "recall", "cpu_query", "hand_over")


class OffloadingMethod(Method):
    """Host pages and a device tail; whole blocks are written back once they leave the window.

    Subclasses attend the blocks on the host. They keep two tiers also on a machine without a GPU.

    Attributes
    ----------
    window_blocks : int
        Newest whole blocks that stay on the device.
    stream : PageStream
        Host pages on their way to the device.
    """

    kv: TwoTierKV

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        self.kv = TwoTierKV(batch, heads, dim, config.block_size, keys.dtype, keys.device, config.host_dtype)
        self.window_blocks = config.blocks(config.window)
        self.stream = PageStream()

    @property
    def written(self) -> Mark:
        """The end of the last write-back; wait for it before reading the host."""
        return self.kv.written

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super().check(config)
        for name in SCOUTS_OWN:
            if name not in cls.uses_in_drafts and (value := getattr(config, name)) != getattr(ScoutConfig, name):
                raise ConfigError(
                    f"{name}={value!r} is not possible with method={cls.name!r}: it belongs to 'scout'; leave it out"
                )
        if config.split == "off":
            raise ConfigError(
                f"split='off' is not possible with method={cls.name!r}, which keeps two tiers; try 'auto'"
            )

    @classmethod
    def used_settings(cls, config: ScoutConfig, device: torch.device) -> frozenset[str] | None:
        return cls.uses if cls.uses is None or device.type == "cpu" else cls.uses - ON_HOST

    def settle(self, step: Step) -> None:
        self._write_back(step)

    def end_step(self) -> None:
        self.stream.drop()

    def drain(self) -> None:
        super().drain()
        self.stream.drop()

    def fork(self) -> Self:
        twin = super().fork()
        twin.stream = PageStream()
        return twin

    def flush(self) -> None:
        self.drain()
        self._write_back(None)

    def read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.written.finish()
        return super().read_all()

    def crop(self, length: int) -> None:
        self.written.finish()
        super().crop(length)

    def mark(self) -> Any:
        return self.kv.mark()

    def rollback(self, mark: Any) -> None:
        self.drain()
        self.written.finish()
        if self.stored_by is None:
            self.kv.rollback(mark)
        for reader in self.readers.values():
            reader.rollback(mark)

    def past_chunks(self, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """As of ``Method``; chunks of the host come ahead of their use, those of the next layer behind the last one."""
        held, size = min(past, self.kv.host.length), self.config.block_size
        behind = step.method_behind(self.layer_idx)

        def start_behind(most: int) -> None:
            if isinstance(behind, OffloadingMethod):
                behind.start_past(step, most)

        for piece, coming in self.stream.each(self._chunks(held), self._bringer(step), CHUNKS_AHEAD, start_behind):
            start = piece.first * size
            keys, values = self._wait(step, coming)
            yield start, keys[:, :, : held - start], values[:, :, : held - start]
        if past > held:
            yield held, *self.kv.read(held, past)

    def start_past(self, step: Step, most: int) -> None:
        """Start up to ``most`` copies that ``past_chunks`` of this pass needs, before ``append``."""
        self.stream.start(self._chunks(self.kv.host.length), self._bringer(step), most)

    def past_pages(self, step: Step) -> PagedKV | None:
        if self.kv.device.type != "cpu" or self.config.link_gbps is not None:
            return None  # chunks come over the link, emulated or not
        self.written.finish()
        return self.kv.host

    def state_dict(self) -> State:
        self.written.finish()
        return super().state_dict()

    def pools(self) -> Sequence[PagePool]:
        return [self.kv.host.table.pool]

    def tier_bytes(self) -> dict[str, int]:
        if self.stored_by is not None:
            return {"host": 0, "device": 0}
        return {"host": self.kv.host.used_bytes, "device": self.kv.device_bytes}

    # -- copies to the device -----------------------------------------------------------------------------------

    def _chunks(self, tokens: int) -> list[Piece]:
        """The first ``tokens`` of the host, all KV heads, as passes of several tokens copy them."""
        size = self.config.block_size
        blocks, most = -(-tokens // size), max(1, PAST_CHUNK_TOKENS // size)
        heads = slice(0, self.kv_heads)
        return [Piece(first, min(first + most, blocks), heads) for first in range(0, blocks, most)]

    def _bringer(self, step: Step) -> Bring:
        self.written.finish()
        host, device, link = self.kv.host, self.kv.device, self.config.link_gbps
        return lambda piece: blocks_to_device(step, host, *piece, device, link)

    def _wait(self, step: Step, coming: InFlightCopy) -> tuple[torch.Tensor, torch.Tensor]:
        with step.counters.timed(self.layer_idx, "join"):
            return coming.wait()

    # -- for subclasses -----------------------------------------------------------------------------------------

    def _write_back(self, step: Step | None) -> None:
        links = None if step is None or self.kv.device.type == "cpu" else step.links
        self.kv.write_back(self.window_blocks, links)

    def _attend_tail(self, step: Step, query: torch.Tensor) -> Partial:
        keys, values = self.kv.tail()
        return attend(query, keys, values, *self.scoring, self.padding_mask(step, self.kv.host.length))

    def padding_mask(self, step: Step, first: int, last: int | None = None) -> torch.Tensor | None:
        """The padding mask of tokens ``first:last``, (batch, 1, 1, tokens) of bool; None if there is no padding."""
        return None if step.mask is None else step.padding(self.kv.device)[:, None, None, first:last]
