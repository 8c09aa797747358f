"""What device and CPU tell each other about one layer: memory that both read and write, of a size that stays."""

from __future__ import annotations

import torch

from scout_hf.kernels.cpu import BlockLists


class Mailbox:
    """Lists and query on their way to the CPU, its share on the way back; pinned where the device is a GPU.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
        For its sizes, dtype and device.
    kv_heads, room : int
        Lists per row, and blocks that a list can hold.

    Attributes
    ----------
    query : Tensor as given
    missing : Tensor (batch, kv_heads, room) of int32
        Blocks that the CPU is to attend.
    missing_counts, chosen_counts : Tensor (batch, kv_heads) of int32
        Entries of ``missing``; blocks chosen in all.
    out, lse : Tensor (batch, query_heads, 1, head_dim), (batch, query_heads, 1) of float32
        The CPU's share.
    flag, done, late : Tensor (1,) of int64
        Number of the query that has arrived, of the share that is finished, and of one that did not come in time.
    number : Tensor (1,) of int64
        On the device: queries posted.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, room: int):
        pin = query.device.type == "cuda"
        batch, heads = query.shape[:2]
        self.query = torch.empty(query.shape, dtype=query.dtype, device="cpu", pin_memory=pin)
        lists = {"dtype": torch.int32, "device": "cpu", "pin_memory": pin}
        self.missing = torch.empty((batch, kv_heads, room), **lists)
        self.missing_counts, self.chosen_counts = torch.zeros((2, batch, kv_heads), **lists)
        self.out = torch.zeros(query.shape, dtype=torch.float32, device="cpu", pin_memory=pin)
        self.lse = torch.full((batch, heads, 1), -torch.inf, dtype=torch.float32, device="cpu", pin_memory=pin)
        # A line of the CPU's cache each: the one that a thread watches is not the one that another writes.
        words = torch.zeros((3, 16), dtype=torch.int64, device="cpu", pin_memory=pin)
        self.flag, self.done, self.late = (line[:1] for line in words)
        self.number = torch.zeros(1, dtype=torch.int64, device=query.device)
        if pin:
            # The allocator of pinned memory does not see what Triton launches: a copy on this stream lets it wait for
            # the stream before it gives this memory to others.
            for part in (self.query, self.missing, self.missing_counts, self.out, self.lse, words):
                part.to(query.device, non_blocking=True)

    @property
    def room(self) -> int:
        """Blocks that a list can hold."""
        return self.missing.shape[2]

    def fits(self, query: torch.Tensor, room: int) -> bool:
        """Whether such a query and lists of that many blocks have their place here."""
        return self.query.shape == query.shape and self.query.dtype == query.dtype and room <= self.room

    def lists(self) -> BlockLists:
        """The lists as attention on the CPU takes them."""
        return BlockLists(self.missing, self.missing_counts)
