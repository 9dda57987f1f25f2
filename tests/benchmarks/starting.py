"""What it takes a rank to start and to end: a run of six small rounds. Not a test: run it.

    python tests/benchmarks/starting.py [--repetitions 15]

Median seconds of processor time, and by the clock, of one process: as it is, and with PyTorch
imported plainly, so that the garbage collector knows what it has made. One after the other, in
turns: other load on the machine disturbs both alike.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from launching import environment, write_experiment

PROGRAM = "import sys; from testbed.__main__ import main; sys.exit(main(sys.argv[1:]))"
CONTENDERS = {"as it is": PROGRAM, "imported plainly": f"import torch; {PROGRAM}"}


def once(program: str, folder: Path) -> tuple[float, float]:
    """Run the experiment; return seconds of processor time, and by the clock."""
    line = [sys.executable, "-c", program, "run", "e.yaml", "-o", "r.h5"]
    before, began = os.times(), time.monotonic()
    subprocess.run(
        [*line, "--overwrite", "--progress", "none"],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    took, after = time.monotonic() - began, os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experiment(folder / "e.yaml")
        once(PROGRAM, folder)  # compiles, and brings files into memory
        for _ in range(repetitions):
            for contender, program in CONTENDERS.items():
                found[contender].append(once(program, folder))
    print(f"{'':20}{'processor':>10}{'clock':>8}")
    for contender, seconds in found.items():
        used, took = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{contender:20}{used:8.2f} s{took:6.2f} s")


if __name__ == "__main__":
    main()
