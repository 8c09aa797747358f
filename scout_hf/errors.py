"""The exceptions of scout_hf. Messages say what was given, what is allowed and what to try.

>>> try:
...     scout_hf.patch(model, budget=-1)
... except scout_hf.ConfigError as error:
...     print(error)
"""


class ScoutError(Exception):
    """Base class of all errors of scout_hf."""


class ConfigError(ScoutError, ValueError):
    """A setting has a value that is not allowed."""


class MissingFileError(ConfigError, FileNotFoundError):
    """A file that a setting names is missing."""


class UnsupportedModelError(ScoutError, TypeError):
    """The model's attention is not supported; the message says why, and what works."""


class UnsupportedInputError(ScoutError, ValueError):
    """This forward pass cannot use a ScoutCache (gradients, custom masks, ...)."""


class CacheStateError(ScoutError, RuntimeError):
    """The cache cannot do this in its present state, or does not fit the call."""


class RowsError(ScoutError, IndexError):
    """Rows that a cache does not hold, or what names no rows, were to be kept, reordered or repeated."""


class SavingError(ScoutError, TypeError):
    """An object that cannot be pickled, such as a ScoutCache, was to be saved or sent to another process."""


class SessionError(ScoutError, ValueError):
    """A saved session cannot be used: damaged, of another model, or of a newer version; the message says which."""


class BatchError(ScoutError, RuntimeError):
    """A batch cannot go on, such as when its workers end; what was finished is kept."""


class PatchError(ScoutError, RuntimeError):
    """The model cannot be patched or unpatched in its present state."""


class NativeInputError(ScoutError, TypeError):
    """A tensor for native code has the wrong dtype, shape, strides or device."""


class HostMemoryError(ScoutError, MemoryError):
    """The system does not provide the host memory that the cache needs."""


class PinnedMemoryError(HostMemoryError):
    """The driver does not pin the host memory that the cache needs."""


class ResidentMemoryError(ScoutError, MemoryError):
    """The GPU lacks memory for the resident blocks of a layer."""


class ThreadStartError(ScoutError, RuntimeError):
    """The system starts no more threads for background work; a later call tries again."""
