"""The changes of a patch to ``generate()`` of a model: its cache, its inputs, the prefix store and drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scout_hf.cache import ScoutCache
from scout_hf.changes import Attribute
from scout_hf.drafting import Drafting, DraftingGenerate, DraftingInputs, DraftingPasses, DraftingProcessors
from scout_hf.generating import PREPARE, CacheForGenerate
from scout_hf.pass_hooks import PassHooks
from scout_hf.prefix.reuse import GENERATE, Reuse, ReusingGenerate, ReusingInputs
from scout_hf.restart import PREPARE_INPUTS, RestartingInputs

CALL, PROCESSORS = "__call__", "_get_logits_processor"
NAMES = (PREPARE, PREPARE_INPUTS, GENERATE, CALL, PROCESSORS)
OURS = (
    CacheForGenerate,
    RestartingInputs,
    ReusingInputs,
    ReusingGenerate,
    DraftingGenerate,
    DraftingInputs,
    DraftingPasses,
    DraftingProcessors,
)


def changes_of_generate(
    model: Any, new_cache: Callable[[], ScoutCache], hooks: PassHooks, reuse: Reuse | None, drafting: Drafting | None
) -> Iterator[Attribute]:
    """The changes, in order; each is made before the next one is asked for."""
    yield Attribute(model, PREPARE, CacheForGenerate(model, new_cache, hooks))
    inputs: Any = RestartingInputs(getattr(model, PREPARE_INPUTS))
    generate = getattr(model, GENERATE)
    if drafting is not None:
        yield Attribute(model, PROCESSORS, DraftingProcessors(getattr(model, PROCESSORS), drafting))
        yield Attribute(model, CALL, DraftingPasses(model, drafting))
        inputs, generate = DraftingInputs(inputs, drafting), DraftingGenerate(generate, drafting)
    if reuse is not None:
        inputs, generate = ReusingInputs(inputs, reuse), ReusingGenerate(generate, reuse)
    if reuse is not None or drafting is not None:
        yield Attribute(model, GENERATE, generate)
    yield Attribute(model, PREPARE_INPUTS, inputs)


def drop_ours(own: dict[str, Any]) -> None:
    """Delete from the ``__dict__`` of a model what a patch has put there."""
    for name in NAMES:
        if isinstance(own.get(name), OURS):
            del own[name]
