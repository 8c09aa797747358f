"""The registry of model families."""

from __future__ import annotations

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scout_hf.errors import ConfigError, UnsupportedModelError

from .base import Family, Part
from .probe import ProbeFamily
from .refused import GENERATES_INSIDE, REFUSED

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> None:
    """Use `family` for the model types that it names, also types that scout_hf refuses by default.

    Parameters
    ----------
    family : Family
        An instance with `model_types`.
    replace : bool
        Allow model types that have a family already.

    Raises
    ------
    ConfigError
        If it is not such an instance, or a model type has a family and `replace` is False.

    Examples
    --------
    >>> class MyFamily(Family):
    ...     model_types = ("my_model",)
    >>> register_family(MyFamily())
    """
    if not isinstance(family, Family):
        hint = " Pass an instance: add ()." if isinstance(family, type) and issubclass(family, Family) else ""
        raise ConfigError(f"register_family takes an instance of a Family subclass, got {family!r}.{hint}")
    names = family.model_types
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ConfigError(
            f"{type(family).__name__}.model_types must be a tuple of at least one non-empty string, got "
            f"{names!r}. Use the value of model.config.get_text_config(decoder=True).model_type, for example "
            "('llama',)."
        )
    taken = [name for name in names if name in _FAMILIES]
    if taken and not replace:
        served = ", ".join(f"{name!r} by {type(_FAMILIES[name]).__name__}" for name in taken)
        raise ConfigError(f"already served: {served}. Pass replace=True to take over, or name other model types.")
    _FAMILIES.update(dict.fromkeys(names, family))


def family_of(model: Part) -> Family:
    """The family of a model.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, or a PEFT model around one.

    Returns
    -------
    Family
        A `ProbeFamily` for unknown model types.

    Raises
    ------
    UnsupportedModelError
        If the model is not supported; the message says why and what works instead.

    Examples
    --------
    >>> type(family_of(model)).__name__
    'Llama'
    """
    model = _causal_lm(model)
    if inner := GENERATES_INSIDE.get(model.config.model_type):
        raise UnsupportedModelError(
            f"{_name(model)}: its generate() runs that of its language model, which is the one to patch: "
            f"scout_hf.patch(model.{inner})"
        )
    model_type = model.config.get_text_config(decoder=True).model_type
    if model.config.model_type in REFUSED:
        model_type = model.config.model_type
    family = _FAMILIES.get(model_type)
    if family is None and model_type in REFUSED:
        raise UnsupportedModelError(
            f"{_name(model)} (model type {model_type!r}) is not supported: {REFUSED[model_type]}"
        )
    if family is None:
        family = ProbeFamily()
    decoder = family.decoder(model)
    if not _calls_attention_interface(decoder):
        raise UnsupportedModelError(
            f"{_name(model)} (model type {model_type!r}) computes attention itself instead of calling the "
            "attention interface of transformers, so there is nothing to put scout_hf's attention into. "
            "Try a newer transformers: more models use the interface with every release."
        )
    family.check(decoder)
    try:
        layers = family.layers(decoder)
    except AttributeError:
        layers = ()
    if not len(layers):
        raise UnsupportedModelError(
            f"{_name(model)}: its decoder {type(decoder).__name__} has no `layers` to hook into, so it is no "
            f"decoder-only language model as scout_hf knows them. {_ALLOWED}"
        )
    return family


_ALLOWED = (
    "Supported are decoder-only models that generate text, for example "
    "AutoModelForCausalLM.from_pretrained(...) of Llama, Qwen, Mistral, Phi, Gemma, gpt-oss; "
    "models of other families can be added with scout_hf.patches.register_family."
)


def _causal_lm(model: Part) -> nn.Module:
    """The model itself, or the one that a PEFT model wraps; all but decoder-only generators are refused."""
    if isinstance(model, str):
        raise UnsupportedModelError(
            f"got the string {model!r}, need a loaded model. Try AutoModelForCausalLM.from_pretrained({model!r}) first."
        )
    if isinstance(model, type):
        raise UnsupportedModelError(
            f"got the class {model.__name__}, need a loaded model. Try {model.__name__}.from_pretrained(...) first."
        )
    if callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        hint = " Unwrap it first (`model.module`)." if hasattr(model, "module") else ""
        raise UnsupportedModelError(f"got {_name(model)}, which is no transformers model.{hint} {_ALLOWED}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_name(model)} is an encoder-decoder model: its decoder also attends to the encoder, whose "
            f"keys and values do not grow. {_ALLOWED}"
        )
    whole: Part = model
    if not callable(getattr(model, "get_decoder", None)) or not whole.can_generate():
        raise UnsupportedModelError(
            f"{_name(model)} cannot generate text (no language-model head with generate()). {_with_head(model)}"
        )
    return model


def _with_head(model: Part) -> str:
    """What to use in place of a model without a language-model head."""
    whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type)
    if whole is None:
        return _ALLOWED
    return f"Use {whole}, which has one; AutoModelForCausalLM.from_pretrained(...) loads it."


def _calls_attention_interface(decoder: Part) -> bool:
    """Whether `set_attn_implementation` has any effect on the decoder, as transformers itself sees it."""
    check = getattr(type(decoder), "_can_set_attn_implementation", None)
    return check is None or check()


def _name(model: object) -> str:
    return type(model).__name__
