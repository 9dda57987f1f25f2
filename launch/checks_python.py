"""Python, and the packages that a run needs."""

import operator
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from launch.checks import Finding, State

DISTRIBUTION = "label-leakage-testbed"
# What launches with one process can do without.
_OPTIONAL = frozenset(("mpi4py",))
_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def examine_python(environment: Mapping[str, str]) -> list[Finding]:
    """Look at Python, its environment, and the packages of the extra ``run``."""
    findings = [_python(), _environment(environment)]
    try:
        requires = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        found = f"the package {DISTRIBUTION} is not installed, so that its needs are not known"
        fix = "pip install -e '.[run]' in the repository"
        return [*findings, Finding("python", "packages", "note", found, fix)]
    return findings + examine_packages(needed(requires))


def _python() -> Finding:
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        wanted = ""
    version = platform.python_version()
    if satisfies(version, wanted):
        return Finding("python", "Python", "ok", version)
    fix = "make .venv with a newer one: PYTHON=python3.12 ./launch/quickstart"
    return Finding("python", "Python", "missing", f"{version}, expected {wanted}", fix)


def _environment(environment: Mapping[str, str]) -> Finding:
    what = "environment"
    activated = environment.get("VIRTUAL_ENV", "")
    if sys.prefix == sys.base_prefix:
        if "CONDA_PREFIX" in environment:
            return Finding("python", what, "ok", f"conda, {environment['CONDA_PREFIX']}")
        found = f"none: {sys.executable} is not in a virtual environment"
        fix = "./launch/quickstart makes .venv; then source .venv/bin/activate"
        return Finding("python", what, "note", found, fix)
    if activated and activated != sys.prefix:
        found = f"{sys.prefix} runs this, but {activated} is the one activated"
        return Finding("python", what, "note", found, f"source {sys.prefix}/bin/activate")
    return Finding("python", what, "ok", f"virtual environment {sys.prefix}")


def needed(requires: Sequence[str]) -> dict[str, str]:
    """Return which versions of which packages a run needs.

    Parameters
    ----------
    requires
        Requirements as in a distribution's metadata: ``torch>=2.2; extra == "run"``.
    """
    found = {}
    for line in requires:
        requirement, _, marker = line.partition(";")
        if marker.strip() in ("", 'extra == "run"', "extra == 'run'"):
            name = re.match(r"[\w.-]+", requirement)
            if name:
                found[name[0]] = requirement[name.end() :].strip()
    return found


def examine_packages(wanted: Mapping[str, str]) -> list[Finding]:
    """Look for packages, each in a range of versions."""
    good, findings = [], []
    for name, versions in sorted(wanted.items(), key=lambda item: item[0].lower()):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if version and satisfies(version, versions):
            good.append(f"{name} {version}")
            continue
        found = f"{version or 'not installed'}, expected {versions or 'any version'}"
        fix = "pip install '.[run]' in the repository"
        if name in _OPTIONAL and not version:
            found += "; without it a run has one process"
        state: State = "note" if name in _OPTIONAL else "missing"
        findings.append(Finding("python", name, state, found, fix))
    if good:
        findings.insert(0, Finding("python", "packages", "ok", ", ".join(good)))
    return findings


def satisfies(version: str, wanted: str) -> bool:
    """Return whether a version is in a range such as ``>=2.2,<3``, by its numbers alone.

    A range in another notation (``~=``) has no version.
    """
    return all(_is_within(version, part.strip()) for part in wanted.split(",") if part.strip())


def _is_within(version: str, part: str) -> bool:
    bound = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)", part)
    if not bound:
        return False
    numbers = [_numbers(version), _numbers(bound[2])]
    length = max(map(len, numbers))
    one, two = (row + [0] * (length - len(row)) for row in numbers)
    return bool(_OPERATORS[bound[1]](one, two))


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with: of ``2.13.0+cpu``, 2, 13 and 0."""
    beginning = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in beginning[0].split(".")] if beginning else []
