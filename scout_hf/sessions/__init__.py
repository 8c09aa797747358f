"""Saved caches: a folder of safetensors and JSON per session, checked, and mapped into memory when it is opened."""

from scout_hf.session_file import FORMAT, read_about
from scout_hf.sessions.fingerprint import Fingerprint, fingerprint
from scout_hf.sessions.folder import Session, read_session, write_session

__all__ = ["FORMAT", "Fingerprint", "Session", "fingerprint", "read_about", "read_session", "write_session"]
