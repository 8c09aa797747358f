"""``ScoutConfig``: all settings, documented and checked."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from dataclasses import dataclass
from typing import Any

from scout_hf.auto_budget import SPARSE_TOKENS
from scout_hf.errors import ConfigError
from scout_hf.recall_intervals import RecallIntervals
from scout_hf.sizes import bytes_of

LEAST_MEMORY = 1 << 16
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
SPLITS = ("auto", "cpu", "off")
CPU_QUERIES = ("auto", "predicted", "real")
HOST_DTYPES = (None, "int8")
GPU_KERNELS = ("auto", "torch", "triton")
FUSED = ("auto", True, False)
HAND_OVERS = ("auto", "join", "flags", "graph")
OF_PATCH = ("attention", "store", "draft")
"""Arguments of ``patch`` beside the settings."""


@dataclass(frozen=True)
class ScoutConfig:
    """How a patched model keeps and attends its KV cache.

    Parameters
    ----------
    method : str, default "scout"
        The method; see ``scout_hf.methods.method_names()``. ``dense`` and ``kvpr`` are exact and take no budget;
        ``scout``, ``infinigen`` and ``hgca`` are sparse. All but ``scout`` always keep two tiers.
    method_options : dict or None, default None
        Settings of that method alone, documented at its class.
    budget : {"auto"}, int, float or None, default "auto"
        Tokens attended per decode step, layer and KV head: an int counts tokens (at least one block), a float in
        (0, 1] is a share of each row's context, ``None`` attends to everything. ``auto``: everything, exactly, while
        that costs little of a step, as measured; 2048 tokens beyond (with method ``scout`` on one tier and a CPU;
        elsewhere always 2048). ``stats()`` tells from where on. Sinks and window count in the budget,
        and are attended even where they exceed it; the block that is being filled does not count. On two tiers a step
        also attends residents that are not in its top-k, as in the paper; it can exceed the budget by the CPU's share.
        Layers whose model chooses with an indexer attend to that choice, whatever the budget is.
    mass : float or None, default None
        Each layer and KV head attends as few blocks as hold this share of the attention mass by the digest's estimate,
        in (0, 1), and at least 256 tokens; sinks count in both. The budget is then the most that it attends; 1.0 sets
        no limit. ``None``: the budget alone decides. Needs a digest that estimates mass: ``auto``, ``sign`` or
        ``sign2``.
    block_size : int, default 32
        Tokens per block, the unit of selection, storage and transfer: 8, 16, 32, 64, 128 or 256.
    sinks : int, default 4
        Tokens at the start of each row that are always attended, rounded up to whole blocks. In a padded row that
        starts inside a block, that block counts as a whole one.
    window : int, default 32
        Most recent tokens that are always attended, rounded up to whole blocks (plus the block being filled).
    dense_layers : int or tuple of int, default ()
        Layers that attend to everything: the first n, or the listed indices, and layers that share their KV.
    digest : str, default "auto"
        What represents a block during selection. ``minmax``: minimum and maximum per channel, as in the paper.
        ``minmax-int8``: the same in half the bytes. ``minmax-sub``: bounds per 8 tokens in 4 bits. ``sign``: one bit
        per channel and token, scored as attention mass. ``sign2``: two bits. ``auto``: ``sign2``, or ``sign`` for large
        head sizes, where native code or a GPU kernel scores it, else ``minmax`` (with ``mass``, ``sign2``).
        ``scout_hf.selection.register_digest`` adds others.
    split : {"auto", "cpu", "off"}, default "auto"
        Where KV is stored. ``auto``: two tiers (host memory, and resident blocks on the GPU) if the model is on a GPU,
        else one tier. ``cpu``: two tiers, both in host memory: the GPU path without a GPU. ``off``: one tier on the
        model's device.
    layer_ahead : bool, default True
        Two tiers: select blocks one layer ahead, with a predicted query (ScoutAttention, section 3.2); ``cpu_query``
        says whether the CPU starts there too. ``False``: select in the layer itself with the real query. One tier
        never predicts.
    cpu_query : {"auto", "predicted", "real"}, default "auto"
        With ``layer_ahead``: the query that the CPU attends with. ``predicted``: as in the paper; the CPU starts one
        layer ahead. ``real``: only the selection is approximate, and the CPU has less time. ``auto``: compare both in a
        layer's first step and in every 4th (with ``hand_over="graph"`` in every 64th), and use the predicted query
        where it changes the layer's output by at most 5 %.
    recall : float, int, RecallIntervals or None, default 0.12
        Two tiers: when selected blocks are copied to the GPU (ScoutAttention, section 3.4). A float in (0, 1]: a layer
        recalls once about that share of its selected tokens is on the CPU (layers take turns, so that their transfers
        do not overlap). An int: every so many steps. ``RecallIntervals`` (from ``handle.profile_recall``): an interval
        per layer. ``None``: never.
    resident : int or None, default None
        Two tiers: resident tokens on the GPU per layer and KV head. ``None``: the budget, or 2048 where that is
        ``None``. Memory is allocated as the context grows, so a number above any context keeps all KV resident.
    threads : int or None, default None
        Two tiers: threads that attend on the CPU, at most the number of spare cores. ``None``: as many as torch uses.
    spin_us : int or None, default None
        Two tiers: microseconds for which those threads look out for work before they sleep. One that sleeps takes
        longer to begin, one that spins takes a core. ``None``: 1000 with ``hand_over`` "flags" or "graph", so that they
        stay awake between two layers of a step; else 100.
    host_dtype : {None, "int8"}, default None
        How keys and values are stored in host memory. ``None``: in the model's dtype. ``int8``: half the bytes of bf16,
        and faster on the CPU; keys have one scale per channel and block, values one per token. Never exact.
    host_memory : int, str or None, default None
        Most host memory for the pages of a cache and its forks, such as ``"8GiB"``: what was not used for longest stays
        in files alone, and is read again when it is wanted. ``None``: no limit, and no files. Not for pages that a GPU
        reads.
    spill_dir : str or None, default None
        With ``host_memory``: the folder of those files, on a local disk. ``None``: that for temporary files. They have
        no name and go with the process.
    cpu_backend : str, default "auto"
        The implementation of attention on the CPU; see ``scout_hf.kernels.cpu.backend_names()``.
    gpu_kernels : {"auto", "torch", "triton"}, default "auto"
        Two tiers: kernels on the GPU. ``auto``: Triton where it can run, else torch operations, which synchronise with
        the GPU several times per layer. ``host_dtype="int8"``, float64 and a head_dim above 256 always use torch.
    hand_over : {"auto", "join", "flags", "graph"}, default "auto"
        Two tiers with Triton: how GPU and CPU synchronise. ``join``: a CUDA event starts the CPU's job, and the main
        thread waits for it. ``flags``: GPU and CPU threads wait for each other by flags in pinned memory, and the main
        thread waits once, at the end of a step; needs the native CPU library. ``graph``: as ``flags``, with the decode
        step captured as a CUDA graph; needs all layers on two tiers of one GPU and a budget in tokens or None. ``auto``
        is ``join``.
    fused : {"auto", True, False}, default "auto"
        Norms, rotary embedding and gates of a decode step in one launch each, for the predicted query too, rounded as
        the model's own operations are. ``auto``: where Triton runs; modules that are not known by their code, or
        have another ``forward`` already, are left alone. ``True``: the same, and an error where it does not run.
        ``False``: never. Set by ``patch``; a cache can only switch it off.
    link_gbps, cpu_gbps : float or None, default None
        With ``split="cpu"``: emulate another machine by limiting copies of KV between the tiers (``link_gbps``) and
        attention on the CPU (``cpu_gbps``) to so many GB/s of KV. ``None``: no limit.
    monitor : bool or float, default False
        Measure what sparse decoding loses, by exact attention of the real query in idle CPU time; see
        ``Stats.fidelity``. A float in (0, 1] is the share of (layer, KV head) pairs measured per decode step; ``True``
        measures one pair in every eighth step; 1.0 measures all pairs, within the step. Outputs never change.

    Raises
    ------
    ConfigError
        Names the field, the value given, what is allowed and what to try.

    Examples
    --------
    >>> config = scout_hf.ScoutConfig(budget=1024, block_size=16)
    >>> handle = scout_hf.patch(model, config)
    """

    method: str = "scout"
    method_options: dict[str, Any] | None = None
    budget: int | float | str | None = "auto"
    mass: float | None = None
    block_size: int = 32
    sinks: int = 4
    window: int = 32
    dense_layers: int | tuple[int, ...] = ()
    digest: str = "auto"
    split: str = "auto"
    layer_ahead: bool = True
    cpu_query: str = "auto"
    recall: float | int | RecallIntervals | None = 0.12
    resident: int | None = None
    threads: int | None = None
    spin_us: int | None = None
    host_dtype: str | None = None
    host_memory: int | str | None = None
    spill_dir: str | None = None
    cpu_backend: str = "auto"
    gpu_kernels: str = "auto"
    hand_over: str = "auto"
    fused: bool | str = "auto"
    link_gbps: float | None = None
    cpu_gbps: float | None = None
    monitor: bool | float = False

    def __new__(cls, *values: Any, **options: Any) -> ScoutConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(
                f"unknown setting {_listed(unknown)}{hint} ScoutConfig has {_listed(known)}; patch() alone also takes "
                f"{_listed(OF_PATCH)}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        for name, example in (("method", "scout"), ("digest", "auto"), ("cpu_backend", "auto")):
            if not isinstance(getattr(self, name), str):
                self._refuse(name, "a registered name, as a string", repr(example))
        if not _is_int(self.block_size) or self.block_size not in BLOCK_SIZES:
            self._refuse("block_size", f"one of {_listed(BLOCK_SIZES)}", "32, or 16 for short contexts")
        self._check_budget()
        self._check_mass()
        for name in ("sinks", "window"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                self._refuse(name, "a number of tokens, 0 or more", "0 to switch it off")
        choices: dict[str, tuple[Any, ...]]
        choices = {"split": SPLITS, "cpu_query": CPU_QUERIES, "host_dtype": HOST_DTYPES}
        choices |= {"gpu_kernels": GPU_KERNELS, "hand_over": HAND_OVERS, "fused": FUSED}
        for name, allowed in choices.items():
            # Not 1 or 0 in place of True or False.
            if not any(given == getattr(self, name) and type(given) is type(getattr(self, name)) for given in allowed):
                self._refuse(name, f"one of {_listed(allowed)}", repr(allowed[0]))
        if not isinstance(self.layer_ahead, bool):
            self._refuse("layer_ahead", "True or False", "True")
        self._check_recall()
        options = self.method_options
        if options is not None and not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
            self._refuse("method_options", "None, or a dict of the method's own settings by name", "None")
        for name, hint in (("link_gbps", "25.0, as a PCIe 4.0 x16 link"), ("cpu_gbps", "100.0, as 36 cores")):
            gbps = getattr(self, name)
            number = isinstance(gbps, (int, float)) and not isinstance(gbps, bool)
            if gbps is not None and not (number and 0 < gbps < float("inf")):
                self._refuse(name, "None, or a positive number of GB/s", hint)
            if gbps is not None and self.split == "off":
                self._refuse(name, "None with split='off': one tier has no link and no CPU beside it", "split='cpu'")
        if self.resident is not None and (not _is_int(self.resident) or self.resident < self.block_size):
            self._refuse("resident", f"None, or at least one block of tokens ({self.block_size})", "None, the budget")
        if self.threads is not None and (not _is_int(self.threads) or self.threads < 1):
            self._refuse("threads", "None, or a whole number of threads from 1 up", "None, torch's own setting")
        if self.spin_us is not None and (not _is_int(self.spin_us) or self.spin_us < 0):
            self._refuse("spin_us", "None, or a whole number of microseconds from 0 up", "None")
        self._check_host_memory()
        self._check_dense_layers()
        if not isinstance(self.monitor, bool) and not (isinstance(self.monitor, float) and 0.0 < self.monitor <= 1.0):
            shares = "True, False, or the share of (layer, KV head) pairs measured per step, a float in (0, 1]"
            self._refuse("monitor", shares, "True, one pair in every eighth step, or 1.0, all pairs in every step")

    @classmethod
    def from_options(cls, config: ScoutConfig | None = None, **options: Any) -> ScoutConfig:
        """A config from keyword options, or another config with some fields replaced.

        Parameters
        ----------
        config : ScoutConfig, optional
            Where the other fields come from; by default the defaults.
        **options
            Fields by name.

        Returns
        -------
        ScoutConfig

        Raises
        ------
        ConfigError
            If a field is unknown or its value not allowed, or ``config`` is not a ScoutConfig.

        Examples
        --------
        >>> base = scout_hf.ScoutConfig(block_size=16)
        >>> scout_hf.ScoutConfig.from_options(base, budget=512).block_size
        16
        """
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            meant = config if _is_int(config) else SPARSE_TOKENS
            raise ConfigError(
                f"config is of type {type(config).__name__}; allowed is a ScoutConfig, or settings by keyword; try "
                f"budget={meant}"
            )
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)} | options)

    @property
    def sparse_budget(self) -> int | float | None:
        """``budget``, and that of sparse steps for ``"auto"``."""
        return SPARSE_TOKENS if isinstance(self.budget, str) else self.budget

    @property
    def spinning_us(self) -> int:
        """``spin_us``, and what None stands for."""
        watched = self.hand_over in ("flags", "graph")
        return self.spin_us if self.spin_us is not None else 1000 if watched else 100

    @property
    def attends_all(self) -> bool:
        """Whether all layers attend to all tokens: ``budget`` is None or 1.0, and ``mass`` takes nothing away."""
        return self.budget is None or (self.budget == 1.0 and self.mass is None)

    @property
    def in_brief(self) -> str:
        """Method and budget, and ``mass`` where it is set, for reports of one line."""
        given = f"method={self.method!r}, budget={self.budget!r}"
        return given if self.mass is None else f"{given}, mass={self.mass!r}"

    def is_dense(self, layer_idx: int) -> bool:
        """Whether this layer attends to all tokens, by ``budget`` or ``dense_layers``."""
        return self.attends_all or self.names_dense(layer_idx)

    def names_dense(self, layer_idx: int) -> bool:
        """Whether ``dense_layers`` names this layer."""
        if isinstance(self.dense_layers, int):
            return layer_idx < self.dense_layers
        return layer_idx in self.dense_layers

    def blocks(self, tokens: int) -> int:
        """How many blocks hold ``tokens`` tokens, rounded up."""
        return -(-tokens // self.block_size)

    def _check_budget(self) -> None:
        allowed = f"'auto', an int of at least one block ({self.block_size} tokens), a float in (0, 1], or None for all"
        if self.budget is None or self.budget == "auto":
            return
        if isinstance(self.budget, int) and _is_int(self.budget):
            if self.budget < self.block_size:
                hint = "1.0 for the whole context, or None" if self.budget == 1 else "2048, or 0.1 for a tenth"
                self._refuse("budget", allowed, hint)
        elif not isinstance(self.budget, float) or not 0.0 < self.budget <= 1.0:
            self._refuse("budget", allowed, "2048, or 0.1 for a tenth")

    def _check_mass(self) -> None:
        if self.mass is None:
            return
        if not isinstance(self.mass, float) or not 0.0 < self.mass < 1.0:
            self._refuse("mass", "None, or a share of the attention mass, a float between 0 and 1", "0.95")
        if self.budget is None:
            self._refuse("mass", "None with budget=None, which attends to everything", "budget=1.0 for no limit")

    def _check_recall(self) -> None:
        allowed = "a float in (0, 1], a whole number of steps from 1 up, RecallIntervals, or None for never"
        if self.recall is None or isinstance(self.recall, RecallIntervals):
            return
        if _is_int(self.recall):
            if self.recall < 1:
                self._refuse("recall", allowed, "None to switch it off")
        elif not isinstance(self.recall, float) or not 0.0 < self.recall <= 1.0:
            path = isinstance(self.recall, str)
            hint = f"RecallIntervals.load({self.recall!r})" if path else "0.12, the paper's threshold"
            self._refuse("recall", allowed, hint)

    def _check_host_memory(self) -> None:
        try:
            fits = self.host_memory is None or bytes_of(self.host_memory) >= LEAST_MEMORY
        except ValueError:
            fits = False
        if not fits:
            self._refuse("host_memory", f"None, or bytes from {LEAST_MEMORY} up, as a number or with a unit", "'8GiB'")
        if self.spill_dir is not None and not isinstance(self.spill_dir, str):
            self._refuse("spill_dir", "None, or the name of a folder", "'/var/tmp'")

    def _check_dense_layers(self) -> None:
        allowed = "a number of leading layers, or a tuple of layer indices"
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if isinstance(self.dense_layers, tuple):
            if not all(_is_int(i) and i >= 0 for i in self.dense_layers):
                self._refuse("dense_layers", allowed, "(0, 1)")
        elif not _is_int(self.dense_layers) or self.dense_layers < 0:
            self._refuse("dense_layers", allowed, "2, or (0, 1)")

    def _refuse(self, name: str, allowed: str, hint: str) -> None:
        raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: {name} takes {allowed}; try {hint}")


def _plain(value: Any) -> Any:
    """Numbers of other libraries, such as NumPy, as Python's int or float."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
