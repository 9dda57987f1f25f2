"""The benchmarks run: their shortest form, without a look at the figures."""

import sys

import pytest
from launching import finish


def test_the_attack_benchmark_runs(data_root):
    line = [sys.executable, "tests/benchmarks/attacks.py", "--quick", "--data", str(data_root)]
    done = finish(line, timeout=200)
    assert done.status == 0, done.err
    for attack in ("llg", "llg_star", "llg_plus", "random"):
        assert attack in done.out


# Eight programs that load PyTorch; beside other tests that takes a while.
@pytest.mark.timeout(600)
def test_the_round_benchmark_runs(data_root):
    line = [sys.executable, "tests/benchmarks/rounds.py", "--quick", "--models", "cnn"]
    done = finish([*line, "--workers", "1", "--data", str(data_root / "mnist")], timeout=500)
    assert done.status == 0, done.err
    for contender in ("torch loop", "mpi4py", "testbed"):
        assert contender in done.out
