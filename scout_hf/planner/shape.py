"""Sizes of a decoder: known models, and from a config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from scout_hf.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes
    ----------
    name : str
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary : int
        As in a transformers config.
    tied : bool
        Whether input and output embeddings share their weights.
    item : int
        Bytes per number (2 for bf16).
    windowed, window : int
        Number of sliding-window layers, and tokens of that window.

    Examples
    --------
    >>> from scout_hf.planner import SHAPES
    >>> SHAPES["llama-3-8b"].kv_bytes
    4096
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    item: int = 2
    windowed: int = 0
    window: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.item

    @property
    def layer_weights(self) -> int:
        """Bytes of one layer: attention and a gated MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.item * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Bytes of the output head."""
        return self.item * self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Bytes of the whole model."""
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)

    @property
    def full(self) -> int:
        """Layers that attend to the whole context."""
        return self.layers - self.windowed

    def shard(self, ranks: int) -> ModelShape:
        """A rank's part under tensor parallelism: heads, MLP and vocabulary are divided among ranks.

        Parameters
        ----------
        ranks : int

        Returns
        -------
        ModelShape

        Raises
        ------
        ConfigError
            If ``ranks`` does not divide them.

        Examples
        --------
        >>> from scout_hf.planner import SHAPES
        >>> SHAPES["llama-3-8b"].shard(8).kv_bytes
        512
        """
        parts = {name: getattr(self, name) for name in ("heads", "kv_heads", "intermediate", "vocabulary")}
        if ranks < 1 or any(size % ranks for size in parts.values()):
            given = ", ".join(f"{name} {size}" for name, size in parts.items())
            raise ConfigError(f"{ranks} ranks do not divide {self.name} ({given}); give a divisor of all of them")
        return replace(self, name=f"{self.name}/{ranks}", **{name: size // ranks for name, size in parts.items()})

    @classmethod
    def of(cls, config: Any, name: str = "") -> ModelShape:
        """Read the sizes from a config.

        Parameters
        ----------
        config : PretrainedConfig or dict
            A config of transformers, or its JSON as a dict.
        name : str
            Defaults to the model type.

        Returns
        -------
        ModelShape

        Raises
        ------
        ConfigError
            If sizes are missing or invalid; for latent attention, for KV shared between layers, and for a mixture of
            experts, whose weights per step depend on the routing: they have no cost model.
        """
        given = config if isinstance(config, dict) else config.get_text_config(decoder=True).to_dict()
        given = given.get("text_config", given)
        name = name or given.get("model_type", "this config")
        if any(given.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ConfigError(f"{name} is a mixture of experts, which has no cost model here; give a dense decoder")
        if given.get("num_kv_shared_layers"):
            raise ConfigError(f"{name} shares KV between layers (num_kv_shared_layers), which has no cost model here")
        if given.get("kv_lora_rank"):
            raise ConfigError(f"{name} has latent attention, which has no cost model here; give a dense decoder")

        def size(*keys: str, default: int | None = None) -> int:
            key = next((key for key in keys if given.get(key) is not None), None)
            if key is None and default is None:
                raise ConfigError(f"{name} has no {' or '.join(keys)}; give the config.json of a decoder")
            value = default if key is None else given[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} has {key}={value!r}; it must be a whole number from 1 up")
            return value

        heads, hidden, types = size("num_attention_heads"), size("hidden_size"), given.get("layer_types") or []
        kv_heads = size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(f"{name} has {heads} query heads for {kv_heads} KV heads; it must be a multiple of them")
        return cls(
            name,
            size("num_hidden_layers"),
            hidden,
            size("intermediate_size", "ffn_dim"),
            heads,
            kv_heads,
            size("head_dim", default=max(1, hidden // heads)),
            size("vocab_size"),
            bool(given.get("tie_word_embeddings", False)),
            windowed=sum(kind == "sliding_attention" for kind in types),
            window=given.get("sliding_window") or 0,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936),
        ModelShape("qwen3-14b", 40, 5120, 17408, 40, 8, 128, 151936),
        ModelShape("qwen3-32b", 64, 5120, 25600, 64, 8, 128, 151936),
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
        ModelShape("gemma3-270m", 18, 640, 2048, 4, 1, 256, 262144, tied=True, windowed=15, window=512),
        ModelShape("qwen2.5-coder-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    )
}
