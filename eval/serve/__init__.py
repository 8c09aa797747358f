"""``scout-hf serve``: transformers' own server in front of a patched model."""
