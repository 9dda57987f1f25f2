"""The files of a set of shares, open and read as one."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from analysis.share_notes import titled
from analysis.shares import ShareSet

if TYPE_CHECKING:
    from testbed.results.reader import Results, Scenario


class Described(Protocol):
    """What figures ask of a run: a file, or a set of shares."""

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def scenarios(self) -> "Sequence[Scenario]": ...  # noqa: D102
    def numbered(self, number: int) -> "Scenario": ...  # noqa: D102


class OpenSet:
    """The files of a set, open; a context manager.

    Attributes
    ----------
    files
        In the order of the shares.
    scenarios
        Those of all files, in the order of the sweep.
    """

    def __init__(self, shares: ShareSet) -> None:
        from testbed.results.reader import open_results

        self._shares = shares
        with ExitStack() as stack:
            self.files: Sequence[Results] = [
                stack.enter_context(open_results(file)) for file in shares.files
            ]
            self._stack = stack.pop_all()
        every = [scenario for results in self.files for scenario in results.scenarios]
        self.scenarios: Sequence[Scenario] = sorted(every, key=lambda one: one.number)

    @property
    def title(self) -> str:
        """Title of the experiment, and beneath it which shares are missing or incomplete."""
        return titled(self.files[0].title, [self._shares])

    def numbered(self, number: int) -> "Scenario":
        """Return the scenario of a number in the sweep."""
        return next(one for one in self.scenarios if one.number == number)

    def __enter__(self) -> "OpenSet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
