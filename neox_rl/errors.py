"""Errors that a person reads: each names the value, the rule and the fix."""

from __future__ import annotations

from collections.abc import Iterator


class NeoxRLError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(NeoxRLError):
    """A configuration that cannot run. Raised before any process starts."""


class DeadlineError(NeoxRLError):
    """A wait passed its deadline. Says what was waited for, for how long, and where to look."""

    def __init__(self, what: str, waited_s: float, hint: str = "") -> None:
        self.what = what
        self.waited_s = waited_s
        super().__init__(f"waited {waited_s:.1f} s for {what}, which did not come" + (f"; {hint}" if hint else ""))


class StalenessError(NeoxRLError):
    """A batch holds a token beyond the staleness bound, or a ticket trained twice: the run must stop."""


class WireError(NeoxRLError):
    """A message whose schema, size or version is not what the protocol says. It was not used."""


class ProtocolError(WireError):
    """A peer of another release, or no peer of this project: repeating the message would not help."""


class RefusedError(WireError):
    """A request that servers refuse which answer others: it would be refused again, by any of them."""


class ServerFailedError(NeoxRLError):
    """A server that did not answer, answered 5xx, refused for now, or answered with what no policy made: another may, or it may later."""


class WeightError(NeoxRLError):
    """A snapshot that is incomplete or whose digest differs: it must never become live."""


class DiskFullError(NeoxRLError):
    """Files could not be written whole for lack of room, and what was there before is as it was: with room it may be done again."""


class DiskStaysFullError(DiskFullError):
    """There was no room in the time that the config gives: a new start would only wait again."""


class DamagedError(WeightError):
    """A checkpoint that does not hold what was saved, or does not fit. Names the file; a new start would only find it again."""


class UnreadableError(WeightError):
    """A checkpoint that the system does not give now: a disk that is away for a moment, no memory, no files. A new start may read it."""


class ProcessDiedError(NeoxRLError):
    """A process of the run ended when it should not have. Names the process, its exit status and its log."""


class JournalError(NeoxRLError):
    """The journal cannot be written, or does not hold what it must. Names the directory and what is missing."""


class JournalFullError(JournalError):
    """The disk did not take the journal in the time that the config gives it: a new start would only wait again."""


GIVES_UP = 3
"""Exit status of a process whose error would only come again: the run is broken, not the process. Nobody starts it again."""
_HOPELESS = ConfigError | DamagedError | StalenessError | JournalFullError | DiskStaysFullError | RefusedError


def exit_status(error: NeoxRLError) -> int:
    """Of a process that ends with this error."""
    return GIVES_UP if isinstance(error, _HOPELESS) else 1


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The single errors of nested task groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
