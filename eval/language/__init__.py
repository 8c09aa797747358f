"""Language models for studies and the demo: packaged ones that arrive by pip, folders, GGUF files, names of the hub."""

from .load import load, usual_dtype
from .packaged import PACKAGED, Packaged, fetched

__all__ = ["PACKAGED", "Packaged", "fetched", "load", "usual_dtype"]
