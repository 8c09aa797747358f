"""``scout-hf batch``: the prompts of a file."""
