"""What a process said on stderr."""


def but_for_torchao(errors: str) -> str:
    """Without the lines that torchao, where it is installed, writes when transformers imports it."""
    lines = errors.splitlines(keepends=True)
    return "".join(line for line in lines if "torchao" not in line and "torch/utils/_pytree.py" not in line)
