"""What the server needs to be installed; looked up, not imported."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from scout_hf.errors import ConfigError

SERVER = "transformers.cli.serving"
PACKAGES = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")
"""Those of transformers' own extra `serving` that it does not install anyway."""


def must_be_servable() -> None:
    """ConfigError if this transformers has no such server, or packages of it are missing."""
    if find_spec("transformers.cli") is None or find_spec(SERVER) is None:
        raise ConfigError(
            f"transformers {version('transformers')} has no server that takes a model manager ({SERVER}); "
            "5.17 and 5.24 have one: pip install --upgrade transformers"
        )
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"the server of transformers needs {', '.join(missing)}: pip install 'scout_hf[serve]', "
            "or in a checkout pip install '.[serve]'"
        )
