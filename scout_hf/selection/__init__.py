"""Block selection: a digest per block, scores of digests against a query, and the top-k blocks within a budget."""

from scout_hf.selection.auto import check_digest, digest_for
from scout_hf.selection.coarse import coarse_for
from scout_hf.selection.digest import Digest, digest_names, make_digest, register_digest
from scout_hf.selection.grid import Int8MinMax, SubMinMax
from scout_hf.selection.group_mass import mean_share
from scout_hf.selection.lent import LentSelector
from scout_hf.selection.minmax import MinMax
from scout_hf.selection.pick import Pick, choose, pack_lists
from scout_hf.selection.selector import Selector
from scout_hf.selection.sign import SignCode, SignCode2
from scout_hf.selection.table import DigestTable

__all__ = [
    "Digest",
    "DigestTable",
    "Int8MinMax",
    "LentSelector",
    "MinMax",
    "Pick",
    "Selector",
    "SignCode",
    "SignCode2",
    "SubMinMax",
    "check_digest",
    "choose",
    "coarse_for",
    "digest_for",
    "digest_names",
    "make_digest",
    "mean_share",
    "pack_lists",
    "register_digest",
]
