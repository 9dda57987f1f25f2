"""Submitting a job; and what helps where sbatch does not take it, by what it says."""

import re
import sys

from launch.words import Command, NoAnswer
from testbed.errors import UserError

# Seconds for sbatch, which waits where the controller is busy.
_PATIENCE = 120.0
_SHOWS = "`sinfo -o '%P %D %c %m %G %l'` shows nodes, CPUs, MB, GPUs and time limits of partitions"
_BUSY = (
    "the controller is busy, and may have taken the job: look with `squeue --me` before you try "
    "again"
)
# The signs are pieces of Slurm's messages (src/common/slurm_errno.c), in small letters; the first
# that is in a message counts.
_FIXES = (
    (
        "account/partition",
        "--account takes one that you belong to, and that the partition is open to: `sacctmgr show "
        "associations user=$USER` lists yours where the site keeps accounts",
    ),
    ("invalid partition", "--partition takes one of: {partitions}"),
    ("group not permitted", "--partition takes one that is open to you, of: {partitions}"),
    (
        "invalid account",
        "--account takes one that you belong to: `sacctmgr show associations user=$USER` lists "
        "yours",
    ),
    ("invalid qos", "--qos takes one that your account has: `sacctmgr show qos` lists all"),
    (
        "accounting/qos policy",
        "a limit of your account or of the QOS is reached: fewer nodes, less --time, or another "
        "--qos; `sacctmgr show qos` and `sacctmgr show associations user=$USER` list the limits",
    ),
    (
        "no partition specified",
        "the site has no default partition: --partition takes one of: {partitions}",
    ),
    ("node count specification", f"--nodes is more than the partition has, or allows: {_SHOWS}"),
    (
        "count specification",
        "--ntasks-per-node or --cpus-per-task is more than a node has, or the partition allows: "
        f"{_SHOWS}",
    ),
    (
        "more processors requested",
        "--ntasks-per-node times --cpus-per-task is more than a node has, or --nodes more than "
        f"there are: {_SHOWS}",
    ),
    (
        "(gres) specification",
        f"no node has so many GPUs, or the site asks for another option: {_SHOWS}; another option "
        "is given as in --sbatch=--gres=gpu:4",
    ),
    ("memory specification", f"ask for less, as in --sbatch=--mem=32G: {_SHOWS}"),
    (
        "node configuration is not available",
        f"no partition has so many nodes with so many CPUs and GPUs: {_SHOWS}",
    ),
    (
        "partition configuration not available",
        f"the partition is down, or does not take so many nodes or so much time: {_SHOWS}",
    ),
    ("partition not available", "the partition is down: --partition takes one of: {partitions}"),
    ("time limit", f"--time is more than the partition allows, or missing: {_SHOWS}"),
    ("--time specification", "--time takes minutes, HH:MM:SS or D-HH:MM:SS"),
    (
        "invalid job array",
        "--array is more than the site allows: `scontrol show config | grep MaxArraySize` shows "
        "how much",
    ),
    ("--signal specification", "--warning takes up to 65535 seconds"),
    ("unable to contact slurm", "the controller does not answer: `scontrol ping` tells; try later"),
    ("socket timed out", _BUSY),
    ("zero bytes were transmitted", _BUSY),
    ("batch script is empty", "the script under slurm/ is damaged: git checkout slurm"),
    ("not look like a batch script", "the script under slurm/ is damaged: git checkout slurm"),
    ("unable to open file", "there is no such script: TESTBED_ROOT names the repository"),
    ("unrecognized option", "this sbatch lacks an option of the line above: see `man sbatch`"),
    (
        "access/permission denied",
        "you may not submit here: ask the site, or submit from another login node",
    ),
)
_ANY = (
    "the line above is what was tried: by hand, and with `sbatch --test-only`, it says the same; "
    "--sbatch=ARGUMENT adds what your site asks for"
)


def submit(command: Command) -> str:
    """Submit a job and return its number.

    Raises
    ------
    UserError
        Slurm does not take it: with what it says, and what helps.
    """
    try:
        said = command.finish(_PATIENCE)
    except NoAnswer:
        raise UserError(
            f"sbatch: no answer within {_PATIENCE:g} s; the job may have been taken: look with "
            "`squeue --me` before you try again, and `scontrol ping` tells whether Slurm is there"
        ) from None
    text = said.stderr.strip()
    if said.returncode != 0:
        text = text or said.stdout.strip() or f"it ends with status {said.returncode}"
        first, *more = [line.removeprefix("sbatch: error: ") for line in text.splitlines()]
        raise UserError(f"sbatch: {first.removeprefix('sbatch: ')}", *more, find_fix(text))
    if text:
        print(text, file=sys.stderr)
    # JOB, or JOB;CLUSTER
    found = re.search(r"^(\d+)(;\S+)?$", said.stdout, re.MULTILINE)
    if found is None:
        raise UserError(
            f"sbatch says {said.stdout!r}, expected the number of a job: `squeue --me` shows "
            "whether there is one"
        )
    return found[1]


def find_fix(text: str) -> str:
    """Return what helps.

    Parameters
    ----------
    text
        What sbatch has said.
    """
    fix = next((fix for sign, fix in _FIXES if sign in text.lower()), _ANY)
    return fix.format(partitions=known_partitions()) if "{partitions}" in fix else fix


def known_partitions() -> str:
    """Return the names of the partitions that sinfo lists."""
    words = ["sinfo", "-h", "-o", "%R"]
    try:
        known = sorted(set(Command(words).finish().stdout.split()))
    except UserError:
        known = []
    return ", ".join(known) or "those that `sinfo` lists"
