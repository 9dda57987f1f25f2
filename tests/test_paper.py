"""The paper's untrained experiments on real data, against what its own code measures there."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from launching import run_here

from analysis import load
from analysis.__main__ import main as analysis

# Success of LLG as the paper's code measures it on MNIST (its CNN, fresh uniform(-0.5, 0.5)
# weights, 100 repetitions), with a standard error of about 0.01 for each cell.
REFERENCE_LLG = {
    "unbalanced": {1: 1.00, 2: 0.94, 4: 0.88, 8: 0.88, 16: 0.86, 32: 0.85, 64: 0.84, 128: 0.85},
    "balanced": {1: 1.00, 8: 0.85, 32: 0.81, 128: 0.80},
}
REFERENCE_ERROR = 0.01
SIGNIFICANCE = 0.01
EXPERIMENTS = "launch/experiments"


@pytest.fixture(scope="module")
def mnist_file(data_root, tmp_path_factory):
    """Run the whole MNIST experiment."""
    output = tmp_path_factory.mktemp("mnist") / "mnist.h5"
    experiment = f"{EXPERIMENTS}/mnist_batch_size.yaml"
    done = run_here("run", experiment, f"data.root={data_root / 'mnist'}", "-o", output)
    assert done.status == 0, done.err
    return output


@pytest.fixture(scope="module")
def mnist(mnist_file):
    """Load the results of the MNIST experiment."""
    return load(mnist_file)


def cells(frame, attack):
    """Yield (distribution, batch size, success of each repetition)."""
    chosen = frame[frame.attack == attack]
    assert len(chosen) == 16 * 100
    for (distribution, size), group in chosen.groupby(["distribution", "batch_size"]):
        yield distribution, size, group.asr.to_numpy()


def test_llg_succeeds_as_often_as_the_reference(mnist):
    compared = []
    for distribution, size, success in cells(mnist, "llg"):
        if size == 1:
            assert (success == 1).all()
        elif size in REFERENCE_LLG[distribution]:
            difference = success.mean() - REFERENCE_LLG[distribution][size]
            error = np.hypot(success.std(ddof=1) / np.sqrt(len(success)), REFERENCE_ERROR)
            compared.append((distribution, size, difference / error))
    assert len(compared) == 10
    # Two-sided, corrected for the number of cells (Bonferroni).
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / len(compared) / 2)
    assert [cell for cell in compared if abs(cell[2]) > limit] == []


@pytest.mark.parametrize(("attack", "least"), [("llg_star", 0.95), ("llg_plus", 0.97)])
def test_knowing_the_model_recovers_nearly_every_label(mnist, attack, least):
    found = {(d, size): success.mean() for d, size, success in cells(mnist, attack)}
    assert {cell: mean for cell, mean in found.items() if mean < least} == {}


def test_the_random_guess_is_what_theory_expects(mnist):
    for distribution, size, success in cells(mnist, "random"):
        rows = mnist[
            (mnist.attack == "random")
            & (mnist.distribution == distribution)
            & (mnist.batch_size == size)
        ]
        error = success.std(ddof=1) / np.sqrt(len(success))
        assert abs(success.mean() - rows.random.mean()) < 4 * error


def test_the_oracle_is_exact_in_every_update(mnist):
    assert (mnist.oracle == 1).all()


def test_cifar_100_agrees_with_the_reference(data_root, tmp_path):
    output = tmp_path / "cifar.h5"
    done = run_here(
        *("run", f"{EXPERIMENTS}/cifar100_batch_size.yaml", "-o", output),
        f"data.root={data_root / 'cifar-100-python'}",
        "sweep.federation.batch_size=[8,128]",
    )
    assert done.status == 0, done.err
    frame = load(output)
    found = frame[frame.attack == "llg"].groupby(["distribution", "batch_size"]).asr
    reference = {
        ("unbalanced", 8): 0.99,
        ("unbalanced", 128): 0.97,
        ("balanced", 8): 0.97,
        ("balanced", 128): 0.93,
    }
    # The reference's figures are given to two digits, so that their last digit counts as error.
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / len(reference) / 2)
    for cell, expected in reference.items():
        success = found.get_group(cell)
        error = np.hypot(success.std() / np.sqrt(len(success)), REFERENCE_ERROR)
        assert abs(success.mean() - expected) < limit * error, cell
    # The paper's dummy inputs for this data set, all ones, do not reach what random ones do.
    success = frame.groupby(["attack", "distribution", "batch_size"]).asr.mean()
    assert (success["llg_plus"] >= 0.97).all()
    assert (success["llg_star_random"] >= 0.95).all()
    assert (success["llg_star"] >= 0.90).all()


def test_the_readme_s_table_is_what_the_program_prints(mnist_file, capsys):
    assert analysis(["table", str(mnist_file)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [
        line.split()
        for line in Path("README.md").read_text().splitlines()
        if line.startswith("    ") and line.strip()
    ]
    rows = [words for words in printed if words and words[0].isdigit()]
    assert len(rows) == 16
    header = next(words for words in printed if words[:1] == ["#"])
    assert header in shown
    for row in rows:
        (same,) = [words for words in shown if words[:3] == row[:3]]
        # Another processor may round otherwise, and turn a label or two.
        found, expected = ([float(word.strip("±")) for word in words[3:]] for words in (row, same))
        assert found == pytest.approx(expected, abs=0.02)
