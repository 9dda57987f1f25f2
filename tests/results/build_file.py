"""Writes results files straight from docs/file-format.md: a second implementation of that page.

As a program, ``python build_file.py PATH ROUNDS``, it writes one in SWMR mode: a line N on its
standard input makes it write and commit rounds one by one until there are N, then it answers N.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

# Share of the labels that an attack gets wrong; that of others is 0.3.
ATTACKS = {"random": 1.0, "llg": 0.2, "llg_star": 0.1, "llg_plus": 0.02}
TITLES = {"random": "Random", "llg": "LLG", "llg_star": "LLG*", "llg_plus": "LLG+"}
KNOWLEDGE = {"llg_star": "model", "llg_plus": "auxiliary"}
DTYPES = {"counts": ("i4", -1), "presence": ("i1", -1), "distribution": ("f8", np.nan)}


@dataclass(frozen=True)
class Spec:
    """One scenario to write.

    Attributes
    ----------
    answers
        What an attack answers, by label; counts by default.
    broken, idle
        The assumptions that it breaks, and why an attack was not run, by label.
    errors
        Share of the labels that an attack gets wrong, by label, in place of `ATTACKS`.
    accuracy
        Of the rounds' models; those of a file where it is None were not evaluated.
    believed
        What the server takes for the number of labels, in multiples of what it is.
    """

    swept: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 12
    clients: int = 2
    classes: int = 10
    attacks: Sequence[str] = tuple(ATTACKS)
    bias: bool = True
    local_steps: int = 1
    attack_every: int = 1
    answers: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    believed: float = 1.0

    def answer(self, label: str) -> str:
        return self.answers.get(label, "counts")

    def path(self, label: str) -> str:
        return f"attacks/{label}/{self.answer(label)}"

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "seed": 0,
            "data.name": "digits",
            "labels.distribution": "balanced",
            "model.name": "cnn",
            "federation.batch_size": 8,
            "federation.attack_every": self.attack_every,
            "pretraining.steps": None,
            "attacks": [{"name": name, "label": name} for name in self.attacks],
            **self.swept,
        }


def paper_sweep(rounds: int = 100, **options: Any) -> list[Spec]:
    return [
        Spec(
            {"labels.distribution": distribution, "federation.batch_size": size},
            rounds=rounds,
            **options,
        )
        for distribution in ("balanced", "unbalanced")
        for size in (1, 2, 4, 8, 16, 32, 64, 128)
    ]


def draw_round(spec: Spec, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Draw a round that follows the identities of a last layer, with attacks that err at random."""
    parameters, classes = spec.parameters, spec.classes
    size = parameters["federation.batch_size"]
    truth, posterior, bias, sums = [], [], [], []
    guesses: dict[str, list[NDArray[Any]]] = {label: [] for label in spec.attacks}
    for _ in range(spec.clients):
        labels = generator.integers(classes, size=size * spec.local_steps)
        if parameters["labels.distribution"] == "unbalanced":
            labels[: len(labels) // 2], labels[-(len(labels) // 4) or len(labels) :] = (
                generator.integers(classes, size=2)
            )
        p = np.exp(generator.normal(scale=0.3, size=(len(labels), classes)))
        p /= p.sum(axis=1, keepdims=True)
        gradient = spec.local_steps * (p - np.eye(classes)[labels])
        mass = generator.normal(30, 3, size=(len(labels), 1))
        truth.append(np.bincount(labels, minlength=classes))
        posterior.append(p.mean(axis=0))
        bias.append(gradient.mean(axis=0))
        sums.append((gradient * mass).mean(axis=0))
        for label in spec.attacks:
            error = spec.errors.get(label, ATTACKS.get(label, 0.3))
            wrong = generator.random(len(labels)) < error
            guess = np.where(wrong, generator.integers(classes, size=len(labels)), labels)
            guess = np.resize(guess, max(1, round(spec.believed * len(labels))))
            found = np.bincount(guess, minlength=classes)
            answers = {"presence": found > 0, "distribution": found / found.sum()}
            guesses[label].append(answers.get(spec.answer(label), found))
    rows = {
        "truth/counts": np.array(truth),
        "truth/posterior": np.array(posterior),
        "observations/row_sums": np.array(sums),
        "observations/bias_gradient": np.array(bias),
        "observations/labels": np.full(
            spec.clients, max(1, round(spec.believed * size * spec.local_steps))
        ),
        "updates/finite": np.ones(spec.clients),
        **{
            spec.path(label): np.array(guess)
            for label, guess in guesses.items()
            if label not in spec.idle
        },
    }
    if spec.accuracy is not None:
        rows["rounds/accuracy"] = np.array(spec.accuracy)
    if not spec.bias:
        del rows["observations/bias_gradient"]
    return rows


class Builder:
    """A results file that is being written."""

    def __init__(self, path: Path, specs: Sequence[Spec], title: str = "A title") -> None:
        self.specs = specs
        self.file = root = h5py.File(path, "w", libver=("v110", "v110"))
        encode(root, "testbed-results")
        root.attrs.update(
            title=title,
            created="2026-01-02T03:04:05+00:00",
            software="label-leakage-testbed",
            software_version="0.1.0",
            dependencies='{"numpy": "2.0"}',
            git_commit="0123456789abcdef0123456789abcdef01234567+",
            mpi_library="Open MPI 5.0.6",
            slurm_job="4711",
            command="testbed run x.yaml",
            experiment="title: A title\n",
        )
        scale(root, "scenario", len(specs))
        scaled(root, root, "committed_rounds", ["scenario"], np.zeros(len(specs), "i8"))
        ranks = encode(root.create_group("ranks"), "ranks")
        scale(ranks, "rank", 3)
        scaled(ranks, ranks, "host", ["rank"], np.array([b"node1", b"node1", b"node22"]))
        devices = np.array([b"cpu", b"cuda:0 NVIDIA H200", b"cuda:0 NVIDIA H200"])
        scaled(ranks, ranks, "device", ["rank"], devices)
        scaled(ranks, ranks, "role", ["rank"], np.array([b"server", b"client", b"client"]))
        scaled(ranks, ranks, "local_rank", ["rank"], np.array([0, 1, 0], "i4"))
        encode(root.create_group("scenarios"), "scenarios")
        for index, spec in enumerate(specs):
            self._declare(root.create_group(f"scenarios/{index:04d}"), spec)

    @staticmethod
    def _declare(group: h5py.Group, spec: Spec) -> None:
        encode(group, "scenario")
        group.attrs["swept"] = json.dumps(dict(spec.swept))
        group.attrs["parameters"] = json.dumps(spec.parameters)
        group.attrs["model_parameters"], group.attrs["model_buffers"] = 100, 0
        group.attrs["last_layer"] = "fc"
        lengths = {"round": spec.rounds, "client": spec.clients, "class": spec.classes}
        for axis, length in lengths.items():
            scale(group, axis, length)
        for name in ("truth", "observations", "attacks", "rounds", "updates", "timings"):
            encode(group.create_group(name), name)
        per_class = dict.fromkeys(["truth/posterior", "observations/row_sums"], ("f4", np.nan))
        if spec.bias:
            per_class["observations/bias_gradient"] = ("f4", np.nan)
        per_class["truth/counts"] = ("i4", -1)
        for label in spec.attacks:
            attack = encode(group.create_group(f"attacks/{label}"), "attack")
            attack.attrs.update(
                name=label,
                title=TITLES.get(label, label),
                knowledge=KNOWLEDGE.get(label, "gradients"),
                source="a paper",
                options="{}",
                answers=spec.answer(label),
                observes='["row sums"]',
                assumes=json.dumps(list(spec.broken.get(label, {}))),
                broken_assumptions=json.dumps(dict(spec.broken.get(label, {}))),
                not_applicable=spec.idle.get(label, ""),
            )
            per_class[spec.path(label)] = DTYPES[spec.answer(label)]
        for name, (dtype, fill) in per_class.items():
            empty(group, name, lengths, dtype, fill)
        if "llg" in spec.attacks:
            calibration = encode(group.create_group("attacks/llg/calibration"), "calibration")
            scaled(calibration, group, "impact", ["round"], np.full(spec.rounds, -0.5))
        per_client = {"round": spec.rounds, "client": spec.clients}
        empty(group, "observations/labels", per_client, "i4", -1)
        empty(group, "updates/finite", per_client, "u1", 0)
        empty(group, "rounds/accuracy", {"round": spec.rounds}, "f8", np.nan)
        empty(group, "timings/attack", {"round": spec.rounds}, "f8", np.nan)

    def write(self, scenario: int, round_: int, rows: Mapping[str, NDArray[Any]]) -> None:
        for name, row in rows.items():
            self.file[f"scenarios/{scenario:04d}/{name}"][round_] = row

    def commit(self, scenario: int, rounds: int) -> None:
        self.file.flush()
        self.file["committed_rounds"][scenario] = rounds
        self.file["committed_rounds"].flush()


def build(
    path: Path,
    specs: Sequence[Spec],
    committed: Sequence[int] | None = None,
    title: str = "A title",
) -> Path:
    """Write a whole file; rounds that are not committed hold rubbish, which shows if used."""
    builder = Builder(path, specs, title)
    generator = np.random.default_rng(0)
    for index, spec in enumerate(specs):
        done = spec.rounds if committed is None else committed[index]
        group = builder.file[f"scenarios/{index:04d}"]
        rows = [draw_round(spec, generator) for _ in range(0, done, spec.attack_every)]
        for name in rows[0] if rows else ():
            values = group[name][:]
            values[: done : spec.attack_every] = [row[name] for row in rows]
            values[done:] = 77
            group[name][:] = values
        builder.commit(index, done)
    builder.file.close()
    return path


def age(path: Path) -> Path:
    """Turn a file into one of version 1.0, which said less."""
    with h5py.File(path, "a") as file:
        groups = [file]
        file.visititems(lambda _, item: groups.append(item) if "encoding-type" in item.attrs else 0)
        for group in groups:
            group.attrs["encoding-version"] = "1.0"
            for name in set(group.attrs) & {
                *("answers", "observes", "assumes", "broken_assumptions", "not_applicable")
            }:
                del group.attrs[name]
        for scenario in file["scenarios"].values():
            del scenario["observations/labels"]
    return path


def encode(group: h5py.Group, kind: str) -> h5py.Group:
    group.attrs["encoding-type"] = kind
    group.attrs["encoding-version"] = "1.1"
    return group


def scale(group: h5py.Group, name: str, length: int) -> None:
    group[name] = np.arange(length)
    group[name].make_scale(name)


def scaled(
    group: h5py.Group, scales: h5py.Group, name: str, axes: Sequence[str], data: NDArray[Any]
) -> None:
    dataset = group.create_dataset(name, data=data)
    for position, axis in enumerate(axes):
        dataset.dims[position].attach_scale(scales[axis])


def empty(
    group: h5py.Group, name: str, lengths: Mapping[str, int], dtype: str, fill: float
) -> None:
    shape = tuple(lengths.values())
    dataset = group.create_dataset(
        name,
        shape,
        dtype,
        chunks=(min(50, shape[0]), *shape[1:]),
        fillvalue=fill,
        compression="gzip",
        shuffle=True,
        fletcher32=True,
    )
    for position, axis in enumerate(lengths):
        dataset.dims[position].attach_scale(group[axis])


def main() -> None:
    spec = Spec(rounds=int(sys.argv[2]))
    builder = Builder(Path(sys.argv[1]), [spec])
    builder.file.swmr_mode = True
    print(0, flush=True)
    generator, done = np.random.default_rng(0), 0
    for line in sys.stdin:
        for round_ in range(done, int(line)):
            # Every count of a round tells its number, so that a reader can be caught out.
            rows = draw_round(spec, generator)
            rows["attacks/llg/counts"] = np.full((spec.clients, spec.classes), round_)
            builder.write(0, round_, rows)
            builder.commit(0, round_ + 1)
        done = int(line)
        print(done, flush=True)


if __name__ == "__main__":
    main()
