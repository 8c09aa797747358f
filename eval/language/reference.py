"""A long text in plain English that every Python brings: its own language reference."""

from __future__ import annotations

from scout_hf.errors import ConfigError


def reference_text() -> str:
    """The topics of ``help()``, one after the other; ConfigError where this Python was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError("this Python came without pydoc_data; give files with --text") from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
