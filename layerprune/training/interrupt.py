"""Stopping at a step's end instead of in its middle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was stopped by the user and can go on from its last checkpoint.

    Args:
        step: steps done.
        folder: the run's folder.
        signal: number of the signal that asked for it.
    """

    def __init__(self, step: int, folder: object, signal: int) -> None:
        super().__init__(
            f"stopped after step {step}; go on with: layerprune train --resume --output {folder}"
        )
        self.step = step
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """What a shell gives a process that the signal ended."""
        return 128 + self.signal


class StopRequest:
    """Notes a Ctrl-C or SIGTERM while it is entered; a second Ctrl-C acts as it always does.

    A further SIGTERM changes nothing: schedulers and launchers each send their own. Outside the
    main thread, where Python takes no signals, it never notes any.

    Attributes:
        signal: number of the signal that was noted first; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
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


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started meanwhile do not hear of Ctrl-C or SIGTERM, until they `leave_group`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(worker: int) -> None:
    """Takes a loader's process out of the group that Ctrl-C and a job's SIGTERM reach.

    It has to fetch data until the step's end. Then the process that trains ends it, by a SIGTERM.

    Args:
        worker: its number, which a loader says.
    """
    os.setpgid(0, 0)
    # What came to the group since the process was made is not for it.
    while (found := signal.sigtimedwait(_STOPS, 0)) is not None:
        if found.si_pid == os.getppid():
            os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
