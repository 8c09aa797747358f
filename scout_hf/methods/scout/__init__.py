"""ScoutAttention (arXiv 2603.27138): the policy (what is attended where), and executors per device."""

from scout_hf.methods.scout.variants import Scout

__all__ = ["Scout"]
