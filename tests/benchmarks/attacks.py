"""The attack benchmark: what an update costs the adversary. Not a test: run it.

    python tests/benchmarks/attacks.py [--data FOLDER] [--quick]

First table: ``infer`` of every registered attack with its default knobs, on 100 updates at once,
for 10, 100 and 1000 classes: microseconds per update. The updates come from the model behind the
attacks: random posteriors and features, labels drawn uniformly, row sums and gradients by their
closed form; the calibrations from the same kind of outputs. Beside it, for LLG, LLG* and LLG+, the
loop of algorithm 1 as it is published (Wainakh et al., PoPETs 2022(2)), one update after the
other, the ratio, and the share of updates for which the two agree.

Second table: ``calibrate`` of every attack that has one, on real data (folders ``mnist`` and
``cifar-100-python`` in --data), the paper's CNN: milliseconds per global model, its forward passes
included.

Times are the best of several repetitions, with one thread.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from testbed.attacks import Attack, Knowledge, Observations, Outputs, attacks, make_attack
from testbed.attacks.adversary import GlobalModel, RestrictedAdversary
from testbed.experiment import parse_experiment
from testbed.plan import make_plan
from testbed.startup import Setups
from testbed.transport.local import LocalTransport

UPDATES, FEATURES, PER_CLASS = 100, 64, 20
# Data set, auxiliary samples per class.
CALIBRATIONS = (("mnist", 50), ("cifar100", 5), ("cifar100", 20))
FOLDERS = {"mnist": "mnist", "cifar100": "cifar-100-python"}


class RandomModel:
    """An adversary whose global model answers with random posteriors and features."""

    def __init__(self, classes: int, batch_size: int) -> None:
        self.classes, self.batch_size, self.seed = classes, batch_size, 1
        self._rng = np.random.default_rng(classes)

    def on_dummy(self, kind: str, samples: int) -> Outputs:  # noqa: ARG002
        """Return outputs on samples without labels."""
        return self._outputs(samples, None)

    def on_auxiliary(self) -> Outputs:
        """Return outputs on auxiliary samples of every class."""
        labels = np.repeat(np.arange(self.classes), PER_CLASS)
        return self._outputs(len(labels), labels)

    def observations(self) -> Observations:
        """Return what the server sees of updates."""
        shape = (UPDATES, self.batch_size)
        labels = self._rng.integers(self.classes, size=shape)
        error = self._posterior(shape)
        np.put_along_axis(
            error, labels[..., None], np.take_along_axis(error, labels[..., None], -1) - 1, -1
        )
        features = self._features(shape)
        weight = np.matmul(error.swapaxes(1, 2), features) / self.batch_size
        return Observations(
            row_sums=np.float32(weight.sum(axis=2)),
            bias_gradient=np.float32(error.mean(axis=1)),
            weight_gradient=np.float32(weight),
            labels=np.full(UPDATES, self.batch_size),
            keys=np.arange(UPDATES),
        )

    def _outputs(self, samples: int, labels: NDArray[np.int64] | None) -> Outputs:
        return Outputs(self._posterior((samples,)), self._features((samples,)), labels)

    def _posterior(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        odds = np.exp(self._rng.normal(size=(*shape, self.classes)))
        posterior: NDArray[np.float64] = odds / odds.sum(axis=-1, keepdims=True)
        return posterior

    def _features(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        # The paper's CNN ends in a sigmoid.
        features: NDArray[np.float64] = 1 / (1 + np.exp(self._rng.normal(size=(*shape, FEATURES))))
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


def inference(classes: Iterable[int], batch_size: int, repetitions: int) -> list[str]:
    """Return the lines of the first table."""
    lines = [f"{'attack':<24}{'C':>6}{'us/update':>12}{'looped':>12}{'ratio':>9}{'agree':>8}"]
    for count in classes:
        adversary = RandomModel(count, batch_size)
        observations = adversary.observations()
        for name in sorted(attacks()):
            start = f"{name:<24}{count:>6}"
            attack = make_attack(name, {})
            try:
                calibration = dict(attack.calibrate(adversary))
                found = attack.infer(observations, calibration).counts
            except Exception as error:  # an attack may need what is not made up here
                lines.append(f"{start}  not measured: {type(error).__name__}: {error}"[:100])
                continue
            taken = best(_Call(attack.infer, observations, calibration), repetitions) / UPDATES
            line = f"{start}{1e6 * taken:>12.1f}"
            defined = looped_infer(attack, observations, calibration)
            if defined is not None:
                call = _Call(looped_infer, attack, observations, calibration)
                looped = best(call, min(repetitions, 3)) / UPDATES
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


def calibration(data: Path, batch_size: int, repetitions: int) -> list[str]:
    """Return the lines of the second table."""
    lines = [f"{'attack':<24}{'data':>10}{'per class':>11}{'ms/model':>11}"]
    for name, per_class in CALIBRATIONS:
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

        for label in sorted(attacks()):
            attack = make_attack(label, {})
            if attack.knowledge is Knowledge.GRADIENTS:
                continue
            adversary = RestrictedAdversary(model, attack.knowledge, batch_size, 1)

            call = _Call(calibrate, attack, adversary, model, state.numpy())
            start = f"{label:<24}{name:>10}{per_class:>11}"
            try:
                call()
            except Exception as error:
                lines.append(f"{start}  not measured: {type(error).__name__}: {error}"[:100])
                continue
            lines.append(f"{start}{1e3 * best(call, repetitions):>11.2f}")
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
    parser.add_argument("--quick", action="store_true", help="three repetitions")
    options = parser.parse_args(arguments)
    repetitions = 3 if options.quick else options.repetitions
    torch.set_num_threads(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {load}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}\n"
        f"{UPDATES} updates, batch size {options.batch_size}, best of {repetitions}\n",
        flush=True,
    )
    print("\n".join(inference(options.classes, options.batch_size, repetitions)), flush=True)
    if options.data is not None:
        lines = calibration(options.data.resolve(), options.batch_size, repetitions)
        print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
