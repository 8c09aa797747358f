"""What transformers computes in many launches, as its files say it, and how it is found again.

Families have copies of these classes, under names of their own; a class of the same name may compute something else in
another family or release. So the code is compared that Python runs. What differs is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from scout_hf.patches.own_forward import OwnForward
from scout_hf.patches.quiet import is_bare

ROTARY = OwnForward.rotary_name


def norm_of_llama(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def norm_of_gemma(self: Any, x: Any) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def scaled_of_gemma(self: Any, x: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def feed_forward_of_llama(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def silu_of_transformers(self: Any, input: Any) -> Any:
    return nn.functional.silu(input)


def rotate_half(x: Any) -> Any:
    """Without a docstring there were other code, from Python 3.13 on."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """As above."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def is_same(found: Any, known: Callable[..., Any]) -> bool:
    """Whether a function runs the code of ``known``, and its global names mean the same.

    Examples
    --------
    >>> from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    >>> is_same(MistralRMSNorm.forward, norm_of_llama)
    True
    """
    if not (isinstance(found, FunctionType) and isinstance(known, FunctionType)):
        return False
    if found.__closure__ or _code(found) != _code(known):
        return False
    ours, theirs = known.__globals__, found.__globals__
    return all(_means(theirs.get(name), ours[name]) for name in known.__code__.co_names if name in ours)


def _means(found: Any, known: Any) -> bool:
    return found is known or (isinstance(known, FunctionType) and is_same(found, known))


def _code(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    numbers = tuple(part for part in code.co_consts if not isinstance(part, str))  # without the docstring
    return code.co_code, code.co_names, numbers, code.co_argcount, function.__defaults__


def unwrapped_function(found: Any) -> Any:
    """The function that the package ``kernels`` has made a module of; others as they are."""
    if isinstance(found, nn.Module) and is_bare(found):
        forward = type(found).forward
        cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or ()))
        return cells["func"].cell_contents if set(cells) == {"func"} else found
    return found
