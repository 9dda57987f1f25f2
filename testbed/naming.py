"""Names that results may have, and what must not be written over."""

import contextlib
from pathlib import Path

from testbed.errors import UserError
from testbed.results.opening import PARTIAL, open_file
from testbed.results.output import partial_path

# What a run keeps beside its results file, or makes them from, ends like this.
_OWN = (".checkpoint", ".pretrained", ".creating", ".working", ".compact", ".new")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def results_path(text: str) -> Path:
    """Return the name that a results file has when it is complete, of what a user gave.

    Parameters
    ----------
    text
        With or without ``.partial``.

    Raises
    ------
    UserError
        It is no name of a file, or one that the system does not take.
    """
    if not text:
        raise UserError("found an empty name, expected that of a results file")
    path, last = Path(text), text.rpartition("/")[2]
    while last.endswith(PARTIAL):
        last = last.removesuffix(PARTIAL)
    try:
        is_folder = path.is_dir()
        if last not in ("", ".", ".."):
            path = path.with_name(last)
            path.with_name(f"{last}.pretrained.new").exists()  # raises where it is too long
    except OSError as error:
        raise UserError(f"{text}: no results file can have this name: {error.strerror}") from None
    if is_folder:
        raise UserError(f"{text}: this is a folder, expected a results file")
    if last in ("", ".", ".."):
        raise UserError(f"{text}: this is no name of a file, expected that of a results file")
    return path


def check_own_name(path: Path) -> None:
    """Raise `UserError` where a name is that of what a run keeps beside its results."""
    if path.name.endswith(_OWN):
        raise UserError(
            f"{path}: names that end in {path.suffix} are those of files that runs keep beside "
            "their results: choose another name"
        )


def check_new_name(path: Path, experiment: Path) -> None:
    """Raise `UserError` where results must not have a name, whether they may replace others or not.

    Parameters
    ----------
    path
        The name.
    experiment
        The experiment file.
    """
    check_own_name(path)
    for name in (path, partial_path(path)):
        with contextlib.suppress(OSError):
            if name.samefile(experiment):
                raise UserError(
                    f"{name}: this is the experiment file: choose another name for the results"
                )


def check_replaceable(path: Path) -> None:
    """Raise `UserError` where a name is that of something else than results."""
    for name in (path, partial_path(path)):
        if name.is_file() and not _is_results_file(name):
            raise UserError(
                f"{name}: this is no results file: it is not replaced; choose another name, or "
                "remove it"
            )


def _is_results_file(path: Path) -> bool:
    """Return whether a file is, or was before something damaged it, a results file; or empty."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from None
    if start != _SIGNATURE:
        return not start
    with contextlib.suppress(UserError), open_file(path) as file:
        return bool(file.attrs.get("encoding-type") == "testbed-results")
    return True
