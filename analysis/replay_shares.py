"""Runs attacks again on all shares of an experiment, into a file for each of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.replay import replay
from analysis.shares import SUFFIXES, ShareFile, find_sets
from testbed.errors import UserError


def replay_shares(
    files: Sequence[str | Path],
    output: str | Path,
    attacks: Sequence[str | Mapping[str, Any]],
    *,
    only: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[str, Path]]:
    """Replay one file, or several shares of one experiment; see `analysis.replay.replay`.

    Parameters
    ----------
    files
        Names of results files.
    output
        The new file. Of several shares ``NAME.h5`` stands for a file ``NAME_IofN.h5`` each.
    attacks, only, overwrite
        As `analysis.replay.replay` takes them.

    Yields
    ------
    tuple of str and Path
        A file and the new one, once that is written.

    Raises
    ------
    UserError
        The files are no shares of one experiment, a new file exists already or is one of those to
        replay, or a file cannot be replayed. Those that were written before stay.
    """
    from testbed.naming import check_own_name, check_replaceable, results_path

    pairs = _outputs(files, results_path(str(output)), overwrite=overwrite)
    for _, new in pairs:
        check_own_name(new)
        if overwrite:
            check_replaceable(new)
    for file, new in pairs:
        yield file, replay(file, new, attacks, only=only, overwrite=overwrite)


def _outputs(
    files: Sequence[str | Path], output: Path, *, overwrite: bool
) -> Sequence[tuple[str, Path]]:
    from testbed.results.output import check_folder, check_output

    if len(files) == 1:
        return [(str(files[0]), output)]
    check_folder(output)
    sets = find_sets(files)
    if len(sets) > 1:
        raise UserError(
            f"{sets[0].name} and {sets[1].name} are no shares of one run, or the same ones: replay "
            "them one by one, each into a file of its own"
        )
    pairs = [(member.file, _name(output, member)) for member in sets[0].members]
    for _, new in pairs:
        if any(_same(file, new) for file in sets[0].files):
            raise UserError(f"{new}: this is a file to replay: choose another name")
        check_output(new, overwrite=overwrite)
    return pairs


def _name(output: Path, member: ShareFile) -> Path:
    suffix = output.suffix if output.suffix in SUFFIXES else ""
    base = output.name.removesuffix(suffix)
    return output.with_name(f"{base}_{member.place}of{member.count}{suffix}")


def _same(file: str, new: Path) -> bool:
    from testbed.results.opening import locate
    from testbed.results.output import partial_path

    return locate(Path(file)).resolve() in (new.resolve(), partial_path(new).resolve())
