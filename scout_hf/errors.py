"""What can go wrong, by name. Every message says what was given, what is allowed and what to try."""


class ScoutError(Exception):
    """Base of every error that scout_hf raises on its own account."""


class ConfigError(ScoutError, ValueError):
    """A setting has a value that is not allowed."""


class MissingFileError(ConfigError, FileNotFoundError):
    """A file that a setting names is not there."""


class UnsupportedModelError(ScoutError, TypeError):
    """The model's attention cannot be served; the message says why and what works."""


class UnsupportedInputError(ScoutError, ValueError):
    """This forward pass cannot be served with a ScoutCache (training, custom masks, ...)."""


class CacheStateError(ScoutError, RuntimeError):
    """The cache is not in a state in which the operation makes sense."""


class SavingError(ScoutError, TypeError):
    """What cannot be pickled was about to be, for a file or another process."""


class PatchError(ScoutError, RuntimeError):
    """The model cannot be patched or unpatched in its present state."""


class NativeInputError(ScoutError, TypeError):
    """A tensor that native code would read or write by its address is not what that code takes it for."""


class HostMemoryError(ScoutError, MemoryError):
    """The system does not give as much host memory as the cache needs."""


class PinnedMemoryError(HostMemoryError):
    """The driver does not pin as much host memory as the cache needs."""


class ResidentMemoryError(ScoutError, MemoryError):
    """The device has less memory than the resident blocks of a layer need."""


class ThreadStartError(ScoutError, RuntimeError):
    """The system does not start a thread that work in the background needs; later it may."""
