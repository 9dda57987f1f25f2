"""What writing a results file costs: commits, and going on with it. Not a test: run it.

    python tests/benchmarks/files.py [--quick] [--folder FOLDER]

First table: seconds per commit of one round, by the way of writing (``results.mode``), the number
of arrays, and the size of the file before. Second: seconds until `ResultsWriter.resume` returns.
Medians; the first column is the clock, the second the CPU time of the process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from testbed.results.records import AttackInfo, Rank, ScenarioHeader
from testbed.results.schema import scenario_arrays
from testbed.results.writer import ResultsWriter, partial_path

CLIENTS, CLASSES, FEATURES, ROUNDS = 8, 10, 128, 30_000


def header(attacks: int, *, weights: bool) -> ScenarioHeader:
    """Return a scenario with so many attacks, each with two arrays of calibration."""
    labels = [f"attack{number}" for number in range(attacks)]
    calibration = {"impact": ((), "f8"), "offset": (("class",), "f8")}
    lengths = {"round": ROUNDS, "client": CLIENTS, "class": CLASSES}
    return ScenarioHeader(
        swept={},
        parameters={},
        model_parameters=13_426,
        model_buffers=0,
        last_layer="fc",
        lengths=lengths | ({"feature": FEATURES} if weights else {}),
        arrays=scenario_arrays(
            bias=True, weight=weights, attacks=dict.fromkeys(labels, ("counts", calibration))
        ),
        attacks=dict.fromkeys(labels, AttackInfo("llg", "LLG", "gradients", "", {})),
    )


def rows_of(scenario: ScenarioHeader) -> dict[str, Any]:
    """Draw a round."""
    rng = np.random.default_rng(0)
    rows = {}
    for name, spec in scenario.arrays.items():
        shape = tuple(scenario.lengths[axis] for axis in spec.axes[1:])
        counts = np.dtype(spec.dtype).kind in "iu"
        rows[name] = rng.integers(9, size=shape) if counts else rng.normal(size=shape)
    return rows


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return what something takes, in seconds: by the clock, and of the CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def options(scenario: ScenarioHeader) -> dict[str, Any]:
    """Return what a writer is told."""
    ranks = [Rank(0, "here", "cpu", "server+client", 0)]
    told: dict[str, Any] = {"attributes": {}, "ranks": ranks, "scenarios": [scenario]}
    return {**told, "commit_seconds": 3600.0}


def grown(path: Path, mode: str, scenario: ScenarioHeader, size: float) -> ResultsWriter:
    """Return the writer of a file that has been committed once and is of that size."""
    writer, rows = ResultsWriter(path, mode=mode, **options(scenario)), rows_of(scenario)
    each = sum(
        np.dtype(spec.dtype).itemsize * np.size(rows[name])
        for name, spec in scenario.arrays.items()
        if name.endswith("weight_gradient")
    )
    for round_ in range(max(1, int(size / each)) if each else 1):
        writer.append(0, round_, rows)
    writer.commit()
    return writer


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small files, few commits")
    parser.add_argument("--folder", help="where to write, which should be on a real disk")
    given = parser.parse_args()
    times = 3 if given.quick else 15
    sizes = (1e6,) if given.quick else (1e6, 1e8, 6e8)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder, "a.h5")
        print("commit of one round          arrays       MB   clock ms     CPU ms")
        for mode in ("swmr", "flush"):
            few, many = (header(count, weights=False) for count in (4, 100))
            cases = [(few, 0.0), (many, 0.0)]
            cases += [(header(4, weights=True), size) for size in sizes]
            for scenario, size in cases:
                writer, rows = grown(path, mode, scenario, size), rows_of(scenario)
                found = []
                for round_ in range(writer.recorded(0), writer.recorded(0) + times):
                    writer.append(0, round_, rows)
                    found.append(timed(writer.commit))
                clock, cpu = (1000 * statistics.median(each) for each in zip(*found, strict=True))
                megabytes = partial_path(path).stat().st_size / 1e6
                size_told = f"{len(scenario.arrays):8} {megabytes:8.1f}"
                print(f"  {mode:24} {size_told} {clock:10.1f} {cpu:10.1f}", flush=True)
                writer.close()
                partial_path(path).unlink()
        print("\nresume                       arrays       MB    clock s      CPU s")
        for scenario, size in [(header(100, weights=False), 0.0)] + [
            (header(4, weights=True), size) for size in ((1e6,) if given.quick else (1e8, 1e9))
        ]:
            grown(path, "swmr", scenario, size).close()
            again = partial(ResultsWriter.resume, path, **options(scenario))
            found = [timed(lambda again=again: again().close()) for _ in range(3)]
            clock, cpu = (statistics.median(each) for each in zip(*found, strict=True))
            megabytes = partial_path(path).stat().st_size / 1e6
            print(f"  {'':24} {len(scenario.arrays):8} {megabytes:8.1f} {clock:10.2f} {cpu:10.2f}")
            partial_path(path).unlink()


if __name__ == "__main__":
    main()
