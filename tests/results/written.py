"""Results files as the writer makes them: small ones, whose numbers tell where they belong."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.results.opening import open_file
from testbed.results.records import AttackInfo, Rank, ScenarioHeader
from testbed.results.schema import Calibrations, scenario_arrays
from testbed.results.writer import ResultsWriter

LENGTHS = {
    "round": 7,
    "client": 3,
    "class": 4,
    "feature": 5,
    "buffer": 7,
    "parameter": 107,
    "length_4": 4,
}
ATTACKS = {
    "llg": AttackInfo("llg", "LLG", "gradients", "a paper", {}),
    "plus": AttackInfo("llg_plus", "LLG+", "auxiliary", "a paper", {"scaling": "consistent"}),
    "random": AttackInfo("random", "Random", "gradients", "", {}),
    "sees": AttackInfo("sees", "Sees", "gradients", "", {}, answers="presence"),
    "shares": AttackInfo(
        "shares",
        "Shares",
        "model",
        "",
        {},
        answers="distribution",
        observes=["whole update"],
        assumes=["distinct labels"],
        broken={"distinct labels": "8 labels"},
        not_applicable="",
        target="accumulated",
        adapted="llg",
        adaptation=["noise: waits"],
    ),
}
DECLARED: Mapping[str, tuple[str, Calibrations]] = {
    "llg": ("counts", {}),
    "plus": ("counts", {"impact": ((), "f8"), "offset": (("class",), "f8")}),
    "random": ("counts", {"seed": ((), "u8")}),
    "sees": ("presence", {}),
    "shares": ("distribution", {"basis": (("client", "class", 4), "f8")}),
}
HEADER = ScenarioHeader(
    swept={"federation.batch_size": 4},
    parameters={"seed": 0, "attacks": ["llg"]},
    model_parameters=100,
    model_buffers=7,
    last_layer="classifier",
    lengths=LENGTHS,
    arrays=scenario_arrays(
        bias=True, weight=True, statistics=True, update=True, accumulated=True, attacks=DECLARED
    ),
    attacks=ATTACKS,
    privacy={"epsilon": 1.5},
)
SMALL = replace(
    HEADER,
    swept={},
    lengths={"round": 2, "client": 1, "class": 3},
    arrays=scenario_arrays(bias=False, weight=False, attacks={"llg": ("counts", {})}),
    attacks={"llg": ATTACKS["llg"]},
)
RANKS = [
    Rank(0, "node1", "cpu", "server", 0),
    Rank(1, "a-longer-name", "cuda:0 NVIDIA H200", "client", 3),
]
FILLS = {"f": np.nan, "i": -1, "u": 0}

Rows = dict[str, NDArray[Any]]


def make(path: Path, **options: Any) -> ResultsWriter:
    defaults: dict[str, Any] = {"attributes": {"title": "A title"}, "ranks": RANKS}
    defaults |= {"scenarios": [HEADER, SMALL], "commit_seconds": 3600.0}
    return ResultsWriter(path, **defaults | options)


def rows_of(header: ScenarioHeader, round_: int) -> Rows:
    """Return a round's row of every array; the numbers tell where they belong."""
    rng = np.random.default_rng(round_)
    rows = {}
    for name, spec in header.arrays.items():
        shape = tuple(header.lengths[axis] for axis in spec.axes[1:])
        if np.dtype(spec.dtype).kind == "f":
            rows[name] = rng.normal(size=shape).astype(spec.dtype)
        else:
            rows[name] = rng.integers(0, 200, size=shape).astype(spec.dtype)
    return rows


def fill(writer: ResultsWriter, header: ScenarioHeader = HEADER, scenario: int = 0) -> None:
    for round_ in range(header.lengths["round"]):
        writer.append(scenario, round_, rows_of(header, round_))


def contents(path: Path) -> dict[str, tuple[str, bytes, dict[str, Any]]]:
    """Return type, bytes and attributes of every object; references become names."""
    found = {}

    with open_file(path) as file:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            links = ("DIMENSION_LIST", "REFERENCE_LIST")
            attributes = {
                k: np.asarray(v).tolist() for k, v in item.attrs.items() if k not in links
            }
            values = item[...] if isinstance(item, h5py.Dataset) else np.empty(0)
            if isinstance(item, h5py.Dataset) and not item.is_scale:
                scales = [[scale.name for scale in dim.values()] for dim in item.dims]
                attributes["scales"] = scales
            found[name] = (f"{values.dtype} {values.shape}", values.tobytes(), attributes)

        visit("/", file)
        file.visititems(visit)
    return found


def resume(path: Path, **options: Any) -> ResultsWriter:
    defaults: dict[str, Any] = {"attributes": {"title": "A title"}, "ranks": RANKS}
    defaults |= {"scenarios": [HEADER, SMALL], "commit_seconds": 3600.0}
    return ResultsWriter.resume(path, **defaults | options)


@contextmanager
def opened(
    path: Path, start: Callable[..., ResultsWriter] = make, **options: Any
) -> Iterator[ResultsWriter]:
    writer = start(path, **options)
    try:
        yield writer
    finally:
        writer.close()


def committed(path: Path) -> list[int]:
    with open_file(path) as file:
        rounds: list[int] = file["committed_rounds"][...].tolist()
    return rounds


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own, and return how that ended."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
