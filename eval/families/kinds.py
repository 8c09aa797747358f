"""What can become of a model type."""

from __future__ import annotations

from dataclasses import dataclass

NAMED, PROBE, STOCK, REFUSED, UNBUILT, WRONG = "named", "probe", "stock", "refused", "not built", "wrong"
KINDS = {
    NAMED: "served exactly, with a family of its own in `patches/`",
    PROBE: "served exactly, through the probe",
    STOCK: "patched, and runs as stock",
    REFUSED: "refused by `patch()`, with the reason",
    UNBUILT: "not tried: transformers makes no small random model of it, or cannot run one",
    WRONG: "an error, or other logits than stock: a defect",
}
SERVED = (NAMED, PROBE)


@dataclass(frozen=True)
class Found:
    """What became of one type.

    Attributes
    ----------
    kind : str
        One of ``KINDS``.
    reason : str
        Why it is not served.
    model : str
        The class.
    error : float or None
        The largest difference of float32 logits from stock, by the largest logit where that is above 1.
    padded : bool or None
        Whether a row was left-padded; some models cannot run that.
    layers : str
        How many of its layers scout_hf keeps, ``2 of 4``.
    prediction : str
        ``exact``, where the query that is predicted from the true input of a layer is the true one; ``off``, where none
        is predicted; else what is wrong with it.
    """

    kind: str
    reason: str = ""
    model: str = ""
    error: float | None = None
    padded: bool | None = None
    layers: str = ""
    prediction: str = ""
