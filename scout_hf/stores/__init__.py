"""KV storage: reference-counted pages, paged host memory, block slots on the device."""

from scout_hf.stores.host import PagedKV
from scout_hf.stores.memory import allocate_slab, huge_page_bytes
from scout_hf.stores.packed import PackedKV, make_store
from scout_hf.stores.page_table import PageTable
from scout_hf.stores.pages import PagePool
from scout_hf.stores.protocols import KVStore
from scout_hf.stores.resident_slots import ResidentSlots
from scout_hf.stores.streams import Links
from scout_hf.stores.two_tier_kv import TwoTierKV

__all__ = [
    "KVStore",
    "Links",
    "PackedKV",
    "PagePool",
    "PageTable",
    "PagedKV",
    "ResidentSlots",
    "TwoTierKV",
    "allocate_slab",
    "huge_page_bytes",
    "make_store",
]
