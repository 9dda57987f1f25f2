"""Signals that end a run in good order.

``mpirun`` forwards SIGUSR1 to every rank, and Open MPI's SIGUSR2 too; Slurm sends SIGTERM before it
takes a node away, and any signal that it is asked for before the time is up. The root finishes its
round; the other ranks wait for it.
"""

import signal
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

# SIGHUP where the terminal is closed; `nohup` has it ignored.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopSignal:
    """Notes that a signal has asked for the end of the run.

    A second SIGINT interrupts the program at once.

    Attributes
    ----------
    name
        Of the signal; empty as long as none has come.
    heeded
        Whether this process acts on it, as the root does, until the run is stopping or over; the
        others leave that to the root.
    """

    def __init__(self) -> None:
        self.name = ""
        self.heeded = True

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def install(self) -> "StopSignal":
        """Take over the signals; from the main thread."""
        for number in _SIGNALS:
            # What a shell starts in the background is to ignore SIGINT, and keeps doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def retire(self) -> None:
        """Let no signal end the program any more, whose run is over.

        The interpreter gives signals back their default effect as it ends, which takes a while.
        """
        for number in set(_SIGNALS) - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.heeded:
            return
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
