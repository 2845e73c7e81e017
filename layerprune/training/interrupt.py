"""Stopping at a step's end instead of in its middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """A run was stopped by the user and can go on from its last checkpoint.

    Args:
        step: steps done.
        folder: the run's folder.
    """

    def __init__(self, step: int, folder: object) -> None:
        super().__init__(
            f"stopped after step {step}; go on with: layerprune train --resume --output {folder}"
        )
        self.step = step


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM while it is entered; a second one acts as it always does.

    Outside the main thread, where Python takes no signals, it never notes any.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
