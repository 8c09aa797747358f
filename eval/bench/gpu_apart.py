"""The process of one stage of ``bench gpu``: runs its jobs one by one, and tells what each found in lines of JSON.

``python -m scout_hf.eval.bench.gpu_apart JOBS PIPE GIVEN``; see :mod:`scout_hf.eval.bench.gpu_process`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from scout_hf.eval.bench.gpu_stages import Given, Job, first_line, why_none


def main(jobs: str, pipe: str, given: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # where memory runs out, this process goes, not the one that keeps the results
        Path("/proc/self/oom_score_adj").write_text("1000")
    told = os.fdopen(int(pipe), "w", buffering=1)
    facts = json.loads(given)
    done, got = set(facts.pop("done")), Given(**facts)
    module, _, name = jobs.partition(":")
    run_all(list(getattr(importlib.import_module(module), name)(got)), done, got, told)
    told.close()
    # Without the end of the interpreter, which waits for threads, and unpins memory page by page.
    sys.stdout.flush()
    os._exit(0)


def run_all(jobs: list[Job], done: set[str], given: Given, told: Any) -> None:
    """Run what is left of the jobs, and what that needs."""

    def say(**message: Any) -> None:
        told.write(json.dumps(message, allow_nan=False) + "\n")

    say(plan=[job.name for job in jobs])
    due: list[Job] = []
    for job in reversed(jobs):
        if job.name not in done or (job.again and any(job.name in one.needs for one in due)):
            due.insert(0, job)
    failed = set()
    for job in due:
        say(begin=job.name, limit=job.limit)
        given.so_far = lambda found, name=job.name: say(so_far=name, found=_plain(found))
        begun = time.monotonic()
        missing = [name for name in job.needs if name in failed]
        found = {"skipped": f"not run: {missing[0]} failed"} if missing else _outcome(job)
        failed |= {job.name} if why_none(found) else set()
        say(end=job.name, found=_plain(found | {"seconds": round(time.monotonic() - begun, 2)}))


def _outcome(job: Job) -> dict[str, Any]:
    """What a job found, or why it failed; memory is free again then."""
    try:
        return job.run()
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, MemoryError) or "out of memory" in str(error)
        found = {"oom" if full else "failed": first_line(error)}
    if torch := sys.modules.get("torch"):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _plain(found: Any) -> Any:
    """For JSON, which has no way to write what is not finite."""
    if isinstance(found, dict):
        return {str(name): _plain(one) for name, one in found.items()}
    if isinstance(found, (list, tuple)):
        return [_plain(one) for one in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock a thread may not hold at the end of the interpreter.
    while os.read(0, 1 << 10):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
