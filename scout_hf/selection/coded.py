"""Codes together with the digest that made them."""

from __future__ import annotations

from typing import NamedTuple

from scout_hf.selection.coarse import CoarseCodes
from scout_hf.selection.digest import Digest
from scout_hf.selection.table import DigestTable


class Coded(NamedTuple):
    """Codes and the digest that made them; one object, because codes are void with another digest.

    digest, table : Digest, DigestTable
    coarse : CoarseCodes
        Made of the codes in ``table``.
    fitted_blocks : int
        Blocks that the digest was fitted to.
    fitted_blindly : bool
        Whether it was fitted before any query was seen.
    """

    digest: Digest
    table: DigestTable
    coarse: CoarseCodes
    fitted_blocks: int = 0
    fitted_blindly: bool = False
