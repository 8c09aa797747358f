"""lm-eval's own command line with the model class ``scout``, LongBench from local files and a comparison with stock."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from scout_hf.errors import ScoutError
from scout_hf.eval.harness import INSTALL, HarnessError

OFFLINE = (
    "LongBench runs from local files: --longbench-dir DIR, with <dataset>.jsonl in LongBench's own format. A model or "
    "a tokenizer is read from a folder: pretrained=DIR"
)


def main(argv: Sequence[str]) -> int:
    """Run ``lm-eval`` with these arguments, unknown ones are passed on: 0, or 2 after a message on stderr.

    lm-eval's own errors are raised.
    """
    if importlib.util.find_spec("lm_eval") is None:
        if not {"-h", "--help"}.intersection(argv):
            return _refuse(INSTALL)
        print(f"{_own_options().format_help()}\n{INSTALL}, and its own options to this page.")
        return 0
    own, rest = _own_options().parse_known_args(argv)
    try:
        with ExitStack() as stack:
            _run(own, rest, stack)
    except BrokenPipeError:
        raise  # the reader, such as head, closed the pipe: a connection error to Python, and no network
    except (ScoutError, HarnessError) as error:
        return _refuse(str(error))
    except Exception as error:
        if is_wrong_name(error):
            return _refuse(str(error))
        if not is_network_failure(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        return _refuse(f"the Hugging Face Hub cannot be reached: {reason}. {OFFLINE}")
    return 0


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scout-hf lm-eval run",
        usage="%(prog)s [--longbench-dir DIR] [--beside-stock] [options of lm-eval]",
        description="lm-eval with the model class `scout`: fields of ScoutConfig are --model_args, as in "
        "pretrained=...,budget=2048,block_size=32; and truncation=middle|left, scoring=decode|prefill, "
        "attention=scout|stock.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--longbench-dir",
        "--longbench_dir",
        type=Path,
        metavar="DIR",
        help="read LongBench tasks from <dataset>.jsonl files in this folder instead of the hub",
    )
    parser.add_argument(
        "--beside-stock",
        "--beside_stock",
        action="store_true",
        help="run the tasks with stock attention first, and print both side by side",
    )
    return parser


def _run(own: argparse.Namespace, rest: list[str], stack: ExitStack) -> None:
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    cli = HarnessCLI()
    if {"-h", "--help"}.intersection(rest) and rest[0] not in ("ls", "validate"):
        print(_own_options().format_help())
    with _as_arguments(rest):
        args = cli.parse_args()
    if getattr(args, "command", None) != "run":
        if own.longbench_dir or own.beside_stock:
            raise HarnessError("--longbench-dir and --beside-stock belong to `run`")
        cli.execute(args)
        return
    if own.longbench_dir:
        from scout_hf.eval.harness.longbench import local_tasks

        local = stack.enter_context(local_tasks(own.longbench_dir))
        given = option(args, "include_path")
        args.include_path = [*([given] if isinstance(given, str) else given or []), str(local.folder)]
        for name in asked_tasks(args):
            if absent := local.missing.get(name):
                print(f"{name}: not in {own.longbench_dir}: {', '.join(absent)}", file=sys.stderr)
    if own.beside_stock:
        from scout_hf.eval.harness.beside_stock import run_both

        run_both(args, cli.execute)
    else:
        cli.execute(args)


def option(args: argparse.Namespace, name: str) -> Any:
    """A setting of lm-eval's ``run``: from the command line, or from the YAML file of ``--config``."""
    if (value := getattr(args, name, None)) is not None:
        return value
    if not getattr(args, "config", None):
        return None
    from lm_eval.config.evaluate_config import EvaluatorConfig

    return EvaluatorConfig.load_yaml_config(args.config).get(name)


def asked_tasks(args: argparse.Namespace) -> list[str]:
    """Names of tasks, groups and tags as they were given."""
    given = option(args, "tasks") or []
    return [name for part in ([given] if isinstance(given, str) else given) for name in str(part).split(",")]


def is_wrong_name(error: BaseException) -> bool:
    """Whether the error is an unknown task or model name."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if isinstance(error, ValueError) and "Tasks not found" in str(error):
        return True
    return any(isinstance(one, (HFValidationError, RepositoryNotFoundError)) for one in _behind(error))


def is_network_failure(error: BaseException) -> bool:
    """Whether this error, or one of its causes, is a hub that cannot be reached or is switched off."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds: list[type] = [ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled]
    # Whichever HTTP library this version of the hub client uses.
    for library, name in (("httpx", "TransportError"), ("httpx2", "TransportError"), ("requests", "ConnectionError")):
        kinds += [kind] if (kind := getattr(sys.modules.get(library), name, None)) else []
    return any(isinstance(one, tuple(kinds)) for one in _behind(error))


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


@contextmanager
def _as_arguments(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
