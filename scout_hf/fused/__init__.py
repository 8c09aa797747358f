"""Norms, rotary embedding and gates of a decode step in one launch each, on a GPU.

Of a model with such modules, ``patch`` replaces the ``forward`` of single modules, and only there. A module is known by
the code of its class, see :mod:`scout_hf.fused.stock`.
"""

from scout_hf.fused.install import changes_of_fused

__all__ = ["changes_of_fused"]
