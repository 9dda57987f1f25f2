"""Programs of Slurm's names that say what the real ones have said, so that tests run without it."""

from pathlib import Path


def fake(folder: Path, name: str, out: str = "", err: str = "", status: int = 0) -> Path:
    """Write a program that notes its arguments, and says something.

    Returns the file with its arguments, one a line, those of a second call behind an empty line.
    """
    (folder / f"{name}.out").write_text(out)
    (folder / f"{name}.err").write_text(err)
    noted = folder / f"{name}.arguments"
    script(
        folder,
        name,
        f'printf "%s\\n" "$@" "" >>"{noted}"\n'
        f'cat "{folder}/{name}.out"\ncat "{folder}/{name}.err" >&2\nexit {status}',
    )
    return noted


def script(folder: Path, name: str, text: str) -> Path:
    """Write a shell script as a program."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
    path.chmod(0o755)
    return path
