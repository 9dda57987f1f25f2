"""Where a results file comes from: software, versions, commit, job."""

import datetime as dt
import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import h5py

import testbed

_PACKAGES = ("numpy", "torch", "mpi4py", "h5py", "scikit-learn", "array-api-compat", "pydantic")


def provenance(title: str, experiment: str, mpi_library: str) -> dict[str, str]:
    """Return the root attributes of a results file, as `docs/file-format.md` has them.

    Parameters
    ----------
    title
        Of the experiment.
    experiment
        The resolved experiment as YAML.
    mpi_library
        Name and version; empty for a run without MPI.
    """
    versions = {"python": sys.version.split()[0], "hdf5": h5py.version.hdf5_version}
    versions |= {package: version for package in _PACKAGES if (version := _version(package))}
    return {
        "title": title,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "software": "label-leakage-testbed",
        "software_version": testbed.__version__,
        "dependencies": json.dumps(versions),
        "git_commit": _git_commit(Path(testbed.__file__).parent),
        "mpi_library": mpi_library,
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "command": shlex.join(sys.orig_argv),
        "experiment": experiment,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str:
    """Return the commit of the source tree, with ``+`` if it has changes; empty without one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # A copy that is installed inside some other repository is not of that repository's commit.
        if git("ls-files", "--error-unmatch", "__init__.py"):
            changed = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return ""
