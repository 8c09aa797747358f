"""ScoutAttention (arXiv 2603.27138): the choice of the variant by device and settings."""

from __future__ import annotations

import torch

from scout_hf.config import ScoutConfig
from scout_hf.methods.base import Method, register_method
from scout_hf.methods.offloading import ON_HOST, OffloadingMethod
from scout_hf.methods.scout.executor_torch import TorchExecutor
from scout_hf.methods.scout.executor_triton import TritonExecutor
from scout_hf.methods.scout.one_tier import OneTierScout
from scout_hf.methods.scout.policy import TwoTierScout

# Two-tier settings that ask for what one tier does anyway.
ONE_TIER_DOES = {"layer_ahead": False, "cpu_query": "real", "recall": None}


@register_method
class Scout(TwoTierScout):
    """ScoutAttention: one tier on a CPU; two tiers on a GPU, with Triton kernels if they run there, else with torch.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import Scout
    >>> Scout.has_two_tiers(ScoutConfig(), torch.device("cuda"))
    True
    >>> type(Scout.create(ScoutConfig(), 0, torch.zeros(1, 2, 4, 64))).__name__
    'OneTierScout'
    """

    can_draft = True
    can_lend = True

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super(OffloadingMethod, cls).check(config)  # without the check for settings of other methods

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        predicts = cls.has_two_tiers(config, device) and config.layer_ahead and config.cpu_query != "real"
        return config.attends_all and not predicts and config.host_dtype is None

    @classmethod
    def may_attend_all(cls, config: ScoutConfig, device: torch.device) -> bool:
        return device.type == "cpu" and not cls.has_two_tiers(config, device)

    @classmethod
    def used_settings(cls, config: ScoutConfig, device: torch.device) -> frozenset[str]:
        on_host = frozenset() if device.type == "cpu" else ON_HOST
        if not cls.has_two_tiers(config, device):
            done = {name for name, value in ONE_TIER_DOES.items() if getattr(config, name) == value}
            return OneTierScout.uses - on_host | done
        executor = TritonExecutor if TritonExecutor.runs_on(config, device) else TorchExecutor
        return cls.uses - on_host | executor.uses

    @staticmethod
    def has_two_tiers(config: ScoutConfig, device: torch.device) -> bool:
        """Whether a layer on ``device`` gets two tiers."""
        return config.split == "cpu" or (config.split == "auto" and device.type != "cpu")

    @classmethod
    def create(cls, config: ScoutConfig, layer_idx: int, keys: torch.Tensor) -> Method:
        if not cls.has_two_tiers(config, keys.device):
            return OneTierScout(config, layer_idx, keys)
        return cls(config, layer_idx, keys, TritonExecutor if TritonExecutor.serves(config, keys) else TorchExecutor)
