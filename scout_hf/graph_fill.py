"""Write-back of the block that a captured step has filled: of all layers, by one more launch behind the step's.

That launch is a second graph, captured when a block is first full. It encodes the block, copies it to its host page and
into an empty slot, and moves the rest of the tail to the front, all by numbers that only the device knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.cuda_graph import CudaGraph

if TYPE_CHECKING:
    from scout_hf.graph_clock import Clock
    from scout_hf.methods import Method
    from scout_hf.step import Step


class BlockFills:
    """The write-back that belongs to a captured step.

    Parameters
    ----------
    clock : Clock
        Of the captured step; counts the launches that have run.
    device : torch.device
    stream : Stream or None
        To capture on.
    """

    def __init__(self, clock: Clock, device: torch.device, stream: Any):
        self._clock, self._device, self._stream = clock, device, stream
        self._graph: CudaGraph | None = None
        self._refused = False

    def write_back(self, step: Step, methods: Sequence[Method]) -> None:
        """After a replay: write back what is full, by one launch for all layers if that is possible."""
        if not any(method.is_full for method in methods):
            return
        if self._refused or not all(method.can_fill for method in methods) or not self._launch(methods):
            for method in methods:
                method.write_back(step)
            return
        mark = step.links.mark(self._device)
        for method in methods:
            method.filled(mark)

    def _launch(self, methods: Sequence[Method]) -> bool:
        """Launch the graph; False if it cannot be captured, and then nothing has changed."""
        fill = self._clock.next_fill()
        for method in methods:
            method.filling(fill)
        if self._graph is None:
            graph = CudaGraph(self._device, self._stream)
            try:
                graph.capture(lambda: self._run(methods), lambda: None)
            except Exception as error:
                self._refused = True
                for method in methods:
                    method.unfilled()
                warnings.warn(
                    "hand_over='graph' writes full blocks back layer by layer, because that could not be captured: "
                    f"{error}",
                    stacklevel=2,
                )
                return False
            self._graph = graph
        self._graph.replay()
        return True

    def _run(self, methods: Sequence[Method]) -> None:
        for method in methods:
            method.fill(self._clock)
        self._clock.count_fill()
