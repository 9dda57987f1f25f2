"""The results files that a command line means: names, folders, and patterns in quotes."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.shares import PARTIAL, SUFFIXES
from testbed.errors import UserError

_NUMBERS = re.compile(r"(\d+)")


def expand_files(names: Iterable[str]) -> list[str]:
    """Return the files that names stand for, each of them once.

    Parameters
    ----------
    names
        Of files, as they are; of folders, for the results files in them; or shell patterns, where
        there is no file of that name. A file that is still called ``NAME.partial`` has both names,
        unless there is a ``NAME`` as well.

    Returns
    -------
    list of str
        Those of a folder or a pattern in the order of the numbers in their names.

    Raises
    ------
    UserError
        A folder or a pattern stands for no file.
    """
    files: dict[object, str] = {}
    for name in names:
        for file in _expand(name):
            files.setdefault(_located(file) or file, file)
    return list(files.values())


def _expand(name: str) -> Sequence[str]:
    if _located(name) is not None:
        return [name]
    if Path(name).is_dir():
        found = _results(str(path) for path in Path(name).iterdir())
        if not found:
            raise UserError(f"{name}: there is no results file in this folder (*.h5, *.hdf5)")
        return found
    if not glob.has_magic(name):
        return [name]  # whoever opens it says that it is not there
    patterns = [name] if name.endswith(PARTIAL) else [name, name + PARTIAL]
    # Unlike a Path's, these may be absolute.
    matches = [
        match
        for pattern in patterns
        for match in glob.glob(pattern, recursive=True)  # noqa: PTH207
    ]
    # Beside results files there may be experiments and logs.
    found = _results(matches) or _ordered(matches)
    if not found:
        raise UserError(
            f"{name}: no file matches this pattern, with or without {PARTIAL} behind it"
        )
    return found


def _results(files: Iterable[str]) -> list[str]:
    return _ordered(file for file in files if file.removesuffix(PARTIAL).endswith(SUFFIXES))


def _ordered(files: Iterable[str]) -> list[str]:
    there = {file for file in files if Path(file).is_file()}
    kept = {file for file in there if file.removesuffix(PARTIAL) not in there - {file}}
    return sorted(kept, key=lambda file: [_number(part) for part in _NUMBERS.split(file)])


def _number(part: str) -> tuple[int, str]:
    return (int(part) if part.isdecimal() else -1, part)


def _located(name: str) -> Path | None:
    """Return the file that a name stands for, whatever other names it has; None without one."""
    from testbed.results.opening import locate

    try:
        return locate(Path(name)).resolve()
    except UserError:
        return None
