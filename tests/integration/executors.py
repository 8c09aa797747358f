"""Two tiers through either executor: torch's, or Triton's by a way of handing over.

The kernels are their torch references here, so that whole models run at speed; ``tests/triton`` proves that the kernels
do the same. Slots and mailboxes begin as NaN.
"""

from importlib.util import find_spec

from tests.libraries import ISAS

WAYS = (["join", "flags"] if ISAS else ["join"]) if find_spec("triton") else []
"""Ways of handing over to Triton's executor that can be tried here."""


def use_triton(monkeypatch, way: str) -> None:
    """Everything on two tiers goes through ``TritonExecutor``, by this way."""
    from scout_hf.methods.scout import executor_triton, handoff
    from tests.triton import reference

    reference.install(monkeypatch)
    make = handoff.make_handoff
    monkeypatch.setattr(executor_triton, "make_handoff", lambda wanted, *args: make(way, *args))


def count_every_share(monkeypatch) -> None:
    """A job whose result has been read may not have ended yet, and is then not counted: wait for it."""
    from scout_hf.methods.scout.handoff import Flags

    result = Flags.result

    def result_of_ended(flags, step):
        share = result(flags, step)
        flags.job.drain()
        return share

    monkeypatch.setattr(Flags, "result", result_of_ended)
