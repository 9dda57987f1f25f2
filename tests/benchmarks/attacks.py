"""The attack benchmark: what an update costs the adversary. Not a test: run it.

    python tests/benchmarks/attacks.py [--data FOLDER] [--quick]

First table: ``infer`` of every registered attack with its default knobs, on 100 updates at once,
for 10, 100 and 1000 classes: microseconds per update. The updates come from the model behind the
attacks: random posteriors and features, labels drawn uniformly, row sums and gradients by their
closed form; the calibrations from the same kind of outputs. Beside it, for LLG, LLG* and LLG+, the
loop of algorithm 1 as it is published (Wainakh et al., PoPETs 2022(2)), one update after the
other, the ratio, and the share of updates for which the two agree; for iLRG and RLU, what their
authors' code takes. Calibrations are not in it.

Second table: ``calibrate`` of every attack that has one, on real data (folders ``mnist`` and
``cifar-100-python`` in --data), the paper's CNN: milliseconds per global model, its forward passes
included.

Times are the best of several repetitions, with one thread.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import threadpoolctl
import torch
import yaml
from numpy.typing import NDArray

from testbed.attacks import (
    Attack,
    Head,
    Knowledge,
    Observations,
    Observed,
    Outputs,
    attacks,
    make_attack,
)
from testbed.attacks.adversary import GlobalModel
from testbed.attacks.offline import ArrayAdversary
from testbed.attacks.restricted import RestrictedAdversary
from testbed.attacks.simulation import head_gradient, softmax
from testbed.experiment import parse_experiment
from testbed.plan import make_plan
from testbed.startup import Setups
from testbed.transport.local import LocalTransport

# Options of attacks, by their names.
Knobs = Mapping[str, Mapping[str, object]]

UPDATES, PER_CLASS = 100, 20
# Of the paper's CNN on MNIST and on CIFAR-100; elsewhere 64.
FEATURES = {10: 588, 100: 768}
SLOW_SECONDS = 2.0
# What is not made up here: attacks that look at it cost what their runs of the model cost.
NOT_FORMED = {Observed.UPDATE, Observed.STATISTICS}
# Where an attack's cost grows so fast with C that a measurement would take minutes.
MOST_CLASSES = dict.fromkeys(
    ("rlg", "ilrg", "aux_ls", "class_basis", "ldia", "lmmse", "posterior_regression"), 100
)
# Milliseconds of the authors' code for one attack, on two cores; MNIST and CIFAR-100, B = 8 to 128.
OFFICIAL_MS = {
    ("ilrg", 10): (24, 90),
    ("ilrg", 100): (320, 830),
    ("rlu", 10): (200, 20_000),
    ("rlu", 100): (200, 20_000),
}
# Data set, auxiliary samples per class.
CALIBRATIONS = (("mnist", 50), ("cifar100", 5), ("cifar100", 20))
# What keeps --quick quick: of attacks that train on simulations, a part of them.
QUICK: Knobs = {"ldia": {"shadows": 100}, "posterior_regression": {"simulations": 100}}
FOLDERS = {"mnist": "mnist", "cifar100": "cifar-100-python"}


class RandomModel(ArrayAdversary):
    """An adversary whose global model has random weights, and inputs with random features."""

    def __init__(self, knowledge: Knowledge, classes: int, batch_size: int) -> None:
        self._rng = np.random.default_rng(classes)
        self._width = FEATURES.get(classes, 64)
        weight = self._rng.normal(size=(classes, self._width)) / np.sqrt(self._width)
        self._known = Head(weight, self._rng.normal(size=classes))
        labels = np.repeat(np.arange(classes), PER_CLASS)
        super().__init__(
            knowledge,
            classes,
            batch_size=batch_size,
            head=self._known,
            auxiliary=self._outputs(len(labels), labels),
        )

    def on_dummy(self, kind: str, samples: int) -> Outputs:  # noqa: ARG002
        """Return outputs on samples without labels."""
        return self._outputs(samples, None)

    def observations(self, updates: int) -> Observations:
        """Return what the server sees of updates."""
        shape = (updates, self.batch_size)
        features = self._features(shape)
        posterior = softmax(features @ self._known.weight.T + self._known.bias)
        labels = self._rng.integers(self.classes, size=shape)
        weight, bias = head_gradient(posterior, features, labels)
        return Observations(
            row_sums=np.float32(weight.sum(axis=2)),
            bias_gradient=np.float32(bias),
            weight_gradient=np.float32(weight),
            labels=np.full(updates, self.batch_size),
            keys=np.arange(updates),
            posterior=posterior.mean(axis=1),
        )

    def _outputs(self, samples: int, labels: NDArray[np.int64] | None) -> Outputs:
        features = self._features((samples,))
        logits = features @ self._known.weight.T + self._known.bias
        return Outputs(softmax(logits), features, labels)

    def _features(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        # The paper's CNN ends in a sigmoid.
        features: NDArray[np.float64] = 1 / (
            1 + np.exp(self._rng.normal(size=(*shape, self._width)))
        )
        return features


def looped_decode(
    row_sums: NDArray[np.float64], impact: float, offset: NDArray[np.float64], labels: int
) -> NDArray[np.int64]:
    """Decode one update [C] as algorithm 1 is written, the first step capped at the labels."""
    counts = np.zeros(len(row_sums), np.int64)
    order = np.argsort(row_sums, kind="stable")
    negative = [c for c in order if row_sums[c] < 0][:labels]
    value = row_sums - offset
    for c in negative:
        counts[c] += 1
        value[c] -= impact
    for _ in range(labels - len(negative)):
        c = np.argmin(value)
        counts[c] += 1
        value[c] -= impact
    return counts


def looped_infer(
    attack: Attack, observations: Observations, calibration: dict[str, NDArray[np.float64]]
) -> NDArray[np.int64] | None:
    """Return the counts of LLG, LLG* or LLG+ by their definition; None for another attack."""
    if attack.name not in ("llg", "llg_star", "llg_plus"):
        return None
    rows = []
    for row, labels in zip(np.float64(observations.row_sums), observations.labels, strict=True):
        if attack.name == "llg":
            impact = row[row < 0].sum() * (1 + 1 / len(row)) / labels
            offset = np.zeros_like(row)
        else:
            impact, offset = float(calibration["impact"][0]), calibration["offset"][0]
        rows.append(looped_decode(row, impact, offset, int(labels)))
    return np.stack(rows)


def inference(classes: Iterable[int], batch_size: int, repetitions: int, knobs: Knobs) -> list[str]:
    """Return the lines of the first table."""
    lines = [f"{'attack':<24}{'C':>6}{'us/update':>12}{'looped':>12}{'ratio':>9}{'agree':>8}"]
    for count in classes:
        observations = RandomModel(Knowledge.TRUTH, count, batch_size).observations(UPDATES)
        for name, cls in attacks().items():
            start = f"{name:<24}{count:>6}"
            attack = make_attack(name, knobs.get(name, {}))
            if cls.observes & NOT_FORMED or cls.knowledge is Knowledge.MALICIOUS:
                continue
            if count > MOST_CLASSES.get(name, count):
                continue
            calibration = dict(attack.calibrate(RandomModel(cls.knowledge, count, batch_size)))
            shown = observations.restricted(attack)
            call = _Call(attack.infer, shown, calibration)
            taken = timed(call, repetitions) / UPDATES
            line = f"{start}{1e6 * taken:>12.1f}"
            if (name, count) in OFFICIAL_MS:
                low, high = OFFICIAL_MS[name, count]
                ratios = f"{low / (1e3 * taken):.0f} to {high / (1e3 * taken):.0f} times"
                line += f"  official code {low:g} to {high:g} ms: {ratios} faster"
            defined = looped_infer(attack, observations, calibration)
            if defined is not None:
                call = _Call(looped_infer, attack, observations, calibration)
                looped = best(call, min(repetitions, 3)) / UPDATES
                found = attack.infer(shown, calibration).values
                agree = (np.asarray(found) == defined).all(axis=1).mean()
                line += f"{1e6 * looped:>12.1f}{looped / taken:>9.1f}{agree:>8.2f}"
            lines.append(line)
    return lines


def calibrate(
    attack: Attack,
    adversary: RestrictedAdversary,
    model: GlobalModel,
    state: NDArray[np.float32],
) -> None:
    """Calibrate at a new global model: what the last one answered is forgotten."""
    model.enter(state, 0, (0,))
    attack.calibrate(adversary)


def calibration(
    data: Path,
    sets: Iterable[tuple[str, int]],
    batch_size: int,
    repetitions: int,
    knobs: Knobs,
) -> list[str]:
    """Return the lines of the second table."""
    lines = [f"{'attack':<24}{'data':>10}{'per class':>11}{'ms/model':>11}"]
    for name, per_class in sets:
        experiment = {
            "data": {
                "name": name,
                "root": str(data / FOLDERS[name]),
                "auxiliary_per_class": per_class,
            },
            "model": {"name": "cnn"},
            "federation": {"rounds": 1, "batch_size": batch_size},
            "attacks": ["random"],
        }
        plan = make_plan(parse_experiment(yaml.safe_dump(experiment)))[0]
        setups = Setups(LocalTransport(), torch.device("cpu"))
        setups.load_data([plan])
        setup = setups.make(plan)
        model = GlobalModel(setup.model, setup.auxiliary(), setup.samples.shape)
        state = torch.empty(setup.layout.size)
        setup.initialise(state, plan.initial_key(0))

        for label, cls in attacks().items():
            attack = make_attack(label, knobs.get(label, {}))
            if not attack.arrays() or cls.observes & NOT_FORMED:
                continue
            adversary = RestrictedAdversary(model, attack.knowledge, batch_size, 1)

            call = _Call(calibrate, attack, adversary, model, state.numpy())
            start = f"{label:<24}{name:>10}{per_class:>11}"
            lines.append(f"{start}{1e3 * timed(call, repetitions):>11.2f}")
    return lines


class _Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self) -> None:
        self._function(*self._arguments)


def best(call: Callable[[], object], repetitions: int) -> float:
    """Return the seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def timed(call: Callable[[], object], repetitions: int) -> float:
    """Return the seconds of the fastest of the repetitions; of two where one takes long."""
    first = best(call, 1)
    if repetitions == 1:
        return first
    return min(first, best(call, repetitions if first < SLOW_SECONDS else 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    given = os.environ.get("TESTBED_TEST_DATA")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(given) if given else None,
        help="folder with mnist/ and cifar-100-python/ (default: $TESTBED_TEST_DATA); without, "
        "no calibration is timed",
    )
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100, 1000], metavar="C")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument(
        "--quick", action="store_true", help="one call, 10 classes, MNIST, less training"
    )
    options = parser.parse_args(arguments)
    repetitions, classes, sets = options.repetitions, options.classes, CALIBRATIONS
    knobs: Knobs = {}
    if options.quick:
        repetitions, classes, sets, knobs = 1, classes[:1], CALIBRATIONS[:1], QUICK
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {load}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}\n"
        f"{UPDATES} updates, batch size {options.batch_size}, best of {repetitions}\n",
        flush=True,
    )
    print("\n".join(inference(classes, options.batch_size, repetitions, knobs)), flush=True)
    if options.data is not None:
        lines = calibration(options.data.resolve(), sets, options.batch_size, repetitions, knobs)
        print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
