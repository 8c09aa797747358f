"""Lossless drafts: sparse steps guess the next tokens, and one exact pass says which of them are right."""

from scout_hf.drafting.calls import Drafting, DraftingGenerate, DraftingInputs, DraftingPasses, DraftingProcessors
from scout_hf.drafting.limits import most_drafts

__all__ = ["Drafting", "DraftingGenerate", "DraftingInputs", "DraftingPasses", "DraftingProcessors", "most_drafts"]
