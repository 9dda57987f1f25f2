"""The benchmarks run: their shortest form, without a look at the figures."""

import sys

from launching import finish


def test_the_attack_benchmark_runs(data_root):
    line = [sys.executable, "tests/benchmarks/attacks.py", "--quick", "--data", str(data_root)]
    done = finish(line)
    assert done.status == 0, done.err
    for attack in ("llg", "llg_star", "llg_plus", "random"):
        assert attack in done.out


def test_the_round_benchmark_runs(data_root):
    line = [sys.executable, "tests/benchmarks/rounds.py", "--quick", "--models", "cnn"]
    done = finish([*line, "--workers", "1", "--data", str(data_root / "mnist")])
    assert done.status == 0, done.err
    for contender in ("torch loop", "mpi4py", "testbed"):
        assert contender in done.out
