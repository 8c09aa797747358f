"""ScoutAttention (arXiv 2603.27138): what is attended where, apart from how it is done on a device."""

from scout_hf.methods.scout.variants import Scout

__all__ = ["Scout"]
