"""A long document, questions about facts hidden in it, and one model answering with stock and patched attention.

The model is a real one that arrives by pip; where it cannot be had, a packaged pocket model.
"""

from .command import run

__all__ = ["run"]
