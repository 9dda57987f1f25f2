"""How a run fails: everywhere, at once, and with a message that says who, where and why."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from testbed.errors import UserError
from testbed.transport.base import RanksLost, RootLost, StopAsked, Transport

T = TypeVar("T")

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Seconds.
_PATIENCE = 2


@dataclass
class Position:
    """What a rank is doing, for the report if it fails."""

    scenario: int | None = None
    round: int | None = None
    client: int | None = None

    def __str__(self) -> str:
        named = {"scenario": self.scenario, "round": self.round, "client": self.client}
        return "".join(f", {key} {value}" for key, value in named.items() if value is not None)


class _Stopped(Exception):  # noqa: N818 - not an error of this rank
    """The ranks have agreed to end, and the root has said why."""


def agree(transport: Transport, step: Callable[[], T]) -> T:
    """Do a step of the set-up on every rank, and end all of them if it is an error of the user's.

    The step may not itself end on some ranks only and leave others in a collective call.

    Parameters
    ----------
    transport
        Connects the ranks; all of them call this.
    step
        May raise `UserError`.
    """
    failure, result = None, None
    try:
        result = step()
    except UserError as error:
        failure = str(error)
    failures = transport.gather(failure)
    if any(message is not None for message in failures):
        if transport.is_root:
            # Each message once, by the first rank that has it; the root needs no name.
            reported: set[str | None] = set()
            for rank, message in enumerate(failures):
                if message is not None and message not in reported:
                    who = f"rank {rank}: " if rank else ""
                    for line in message.splitlines():
                        print(f"error: {who}{line}", file=sys.stderr)
                reported.add(message)
        raise _Stopped
    return result  # type: ignore[return-value]


def guarded(transport: Transport, position: Position, body: Callable[[], None]) -> int:
    """Run a rank's whole work and return its exit status.

    An exception ends every rank: the others wait for this one and would wait forever. So does a
    rank that leaves early, by `sys.exit` in a user's model, say, whatever the status.
    """
    try:
        body()
        transport.part()
    except _Stopped:
        transport.part(EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except StopAsked as stop:
        try:
            transport.leave(stop.status)
        except KeyboardInterrupt:
            transport.abort(EXIT_INTERRUPTED)
            return EXIT_INTERRUPTED
        return stop.status
    except BaseException as error:
        who = f"rank {transport.number} of {transport.started} on {transport.host}{position}"
        status = EXIT_FAILURE
        if isinstance(error, UserError):
            print(f"error: {who}: {error}", file=sys.stderr, flush=True)
            status = EXIT_USER_ERROR
        else:
            what = f"failed with {type(error).__name__}: {error}"
            report = "".join(traceback.format_exception(error))
            if isinstance(error, SystemExit):
                what = f"left early, by sys.exit({error.code!r})"
            elif isinstance(error, RanksLost):
                if not transport.is_root:
                    time.sleep(_PATIENCE)  # for the root, which tells it better, ends all ranks
                what, report = f"{transport.blame(error)}; what is committed is readable", ""
            elif isinstance(error, RootLost):
                what, report = "the root has died; what is committed is readable", ""
            elif isinstance(error, KeyboardInterrupt):
                what, report, status = "interrupted", "", EXIT_INTERRUPTED
            print(f"{report}error: {who}: {what}", file=sys.stderr, flush=True)
        transport.abort(status)
        return status
    return 0
