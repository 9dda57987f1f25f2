"""How far a run has got: a live line on a terminal, a line now and then in a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from testbed.plan import ScenarioPlan
from testbed.sweep import describe

MODES = ("auto", "live", "log", "none")

# A log gets a line after these seconds, then twice as late each time, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
_REFRESH = 0.2


class Progress:
    """Reports rounds as they are recorded, with their rate and the time that is left.

    Parameters
    ----------
    title
        Of the experiment.
    total
        Rounds in all scenarios.
    mode
        ``live``: one line that is rewritten; ``log``: lines at growing intervals; ``none``;
        ``auto``: live where a person is likely to look at a terminal, else log.
    done
        Rounds that an earlier start has recorded.
    """

    def __init__(self, title: str, total: int, mode: str, done: int = 0) -> None:
        if mode == "auto":
            mode = "live" if _on_terminal() else "log"
        self._title, self._total, self._mode = title, total, mode
        self._done = self._before = done
        self._scenario = -1
        self._started = self._shown = time.monotonic()
        self._pause, self._apart = _FIRST_PAUSE, 0.0
        # When the last round was done, or what was no round.
        self._last = self._started
        self._entered = False
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._before, self._apart = self._done, 0.0
        self._started = self._shown = self._last = time.monotonic()
        again, self._entered = self._entered, True
        if self._mode == "live":
            # mpirun's pipes hide the terminal from rich; its width comes from the environment.
            console = Console(stderr=True, force_terminal=True)
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                console=console,
                auto_refresh=False,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, rate=""
            )
        elif self._mode == "log" and again:
            self._say(f"going on: {self._done} of {self._total} rounds done")
        elif self._mode == "log":
            done = f", {self._done} done before" if self._done else ""
            self._say(f"{self._title}: {self._total} rounds{done}")
        return self

    def advance(self, plan: ScenarioPlan) -> None:
        """Count a round of a scenario."""
        self._done += 1
        now = self._last = time.monotonic()
        if self._mode == "live":
            if now - self._shown >= _REFRESH or self._done == self._total:
                self._shown = now
                self._refresh(plan, now)
        elif self._mode == "log" and now - self._shown >= self._pause:
            self._shown = now
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._say(f"{self._count()}, {self._rate(now)}; {_name(plan)}")

    def repeat(self, plan: ScenarioPlan, number: int, stop: int) -> None:
        """Tell of a round that was recorded before and is gone through again.

        Its time is no part of the rate.

        Parameters
        ----------
        plan
            The scenario.
        number
            The round.
        stop
            The first round that is new.
        """
        now = time.monotonic()
        self._apart += now - self._last
        self._last = now
        text = f"round {number} again, of {stop} that were recorded; {_name(plan)}"
        if self._mode == "live" and now - self._shown >= _REFRESH:
            self._shown = now
            self.announce(text)
        elif self._mode == "log" and now - self._shown >= self._pause:
            self._shown = now
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._say(text)

    def announce(self, text: str) -> None:
        """Say what keeps the next round waiting."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            self._bar.refresh()
        elif self._mode == "log":
            self._say(text)

    def remark(self, text: str) -> None:
        """Tell the user something that is part of the progress, and so not in mode ``none``."""
        if self._mode == "log":
            self._say(text)
        elif self._mode == "live":
            self.note(text)

    def note(self, text: str) -> None:
        """Tell the user something, whatever the mode."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave the time of what is no round out of the rate, and of the time that is left."""
        started = time.monotonic()
        yield
        self._last = time.monotonic()
        self._apart += self._last - started

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._mode == "log" and error is None:
            seconds = time.monotonic() - self._started
            self._say(f"{self._count()} in {_duration(seconds)}")

    def _refresh(self, plan: ScenarioPlan, now: float) -> None:
        assert self._bar is not None
        self._bar.update(
            self._task, completed=self._done, rate=self._rate(now), description=_name(plan)
        )
        self._bar.refresh()

    def _count(self) -> str:
        return f"{self._done}/{self._total} rounds"

    def _rate(self, now: float) -> str:
        rate = (self._done - self._before) / max(now - self._started - self._apart, 1e-9)
        left = _duration((self._total - self._done) / rate)
        for unit in ("s", "min"):
            if rate >= 0.95:
                return f"{rate:.1f} rounds/{unit}, {left} left"
            rate *= 60
        return f"{rate:.1f} rounds/h, {left} left"

    @staticmethod
    def _say(text: str) -> None:
        print(time.strftime("%H:%M:%S ") + text, file=sys.stderr, flush=True)


def _name(plan: ScenarioPlan) -> str:
    swept = {key.rpartition(".")[2]: value for key, value in plan.swept.items()}
    return f"scenario {plan.index}" + (f" ({describe(swept)})" if swept else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _on_terminal() -> bool:
    """Return whether standard error ends on a terminal, directly or through mpirun.

    mpirun gives its ranks a pipe. The first host's mpirun is the parent of its ranks, MPICH's the
    parent of their parent, and where its own standard error leads can be read there (Linux).
    """
    if sys.stderr.isatty():
        return True
    if not {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        return False
    try:
        launcher = str(os.getppid())
        if "OMPI_COMM_WORLD_RANK" not in os.environ:
            # After the name, in parentheses: state, parent.
            launcher = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[1]
        target = str(Path(f"/proc/{launcher}/fd/2").readlink())
    except OSError:
        return False
    return target.startswith(("/dev/pts/", "/dev/tty"))
