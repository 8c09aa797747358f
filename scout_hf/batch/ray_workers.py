"""Workers on Ray: groups are rows of a Ray Data dataset, and a pool of actors answers them."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scout_hf.batch.groups import Group
from scout_hf.batch.prompts import Prompt
from scout_hf.batch.worker import Recipe, Result, Worker
from scout_hf.errors import BatchError, ConfigError

DEATHS = 2
"""Workers that may die over one prompt; then it has failed."""


@dataclass(frozen=True)
class RayWorkers:
    """How many workers, each with a model of its own, on the Ray cluster that this process is or will be connected to.

    Attributes
    ----------
    workers : int
    cpus, gpus : float
        Of each.

    Raises
    ------
    ConfigError
        If a number is not allowed.
    """

    workers: int = 2
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) or self.workers < 1:
            raise ConfigError(f"workers={self.workers!r} is not allowed: a whole number from 1 up")
        if self.cpus < 0 or self.gpus < 0:
            raise ConfigError(f"cpus={self.cpus}, gpus={self.gpus} is not allowed: numbers from 0 up")


def must_have_ray() -> None:
    """ConfigError if Ray Data is not installed."""
    missing = [name for name in ("ray", "pandas", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Ray Data needs {', '.join(missing)}: pip install 'scout_hf[ray]', or run without Ray")


class _Tally:
    """How often workers died over each prompt: as often as they began it and did not end it."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}

    def begin(self, index: int) -> int:
        """A worker takes this prompt; returns how many died over it before."""
        died = self._open.get(index, 0)
        self._open[index] = died + 1
        return died

    def end(self, index: int) -> None:
        """It has an answer, or an error."""
        self._open.pop(index, None)


class _Actor:
    """A worker as Ray Data takes it: one group in, its results one by one."""

    def __init__(self, recipe: Recipe, tally: Any):
        self._worker, self._tally = Worker(recipe), tally

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import ray

        for result in self._worker.answers(pickle.loads(batch["group"][0]), self._refusal):
            ray.get(self._tally.end.remote(result.index))
            yield {"result": [pickle.dumps(result)]}

    def _refusal(self, prompt: Prompt) -> str | None:
        import ray

        # Ray gives the group of a dead worker to a new one for ever, and one prompt may kill all of them.
        died = ray.get(self._tally.begin.remote(prompt.index))
        return None if died < DEATHS else f"its worker died, {died} times of {died}"


def answers_on_ray(groups: Sequence[Group], recipe: Recipe, pool: RayWorkers) -> Iterator[Result]:
    """Results as they are finished; of each prompt one, also where workers die.

    Raises
    ------
    BatchError
        If no worker can begin, or Ray ends.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    # A block per result, which is passed on at once.
    wanted = {"target_max_block_size": 1, "enable_progress_bars": False}
    before = {name: getattr(context, name) for name in wanted}
    with _connected():
        try:
            vars(context).update(wanted)
            tally = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tally).remote()
            rows = [{"group": pickle.dumps(group)} for group in groups]
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_kwargs={"recipe": recipe, "tally": tally},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=1),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
            for row in results.iter_rows():
                yield pickle.loads(row["result"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise BatchError(
                f"the workers on Ray ended ({reason}); what was finished is kept. Without Ray the same rows are "
                "answered in this process"
            ) from error
        finally:
            vars(context).update(before)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """To the cluster of this process, else to that of RAY_ADDRESS, else to a new one that ends with the block."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
