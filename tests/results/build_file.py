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
        Share of the labels that an attack gets wrong, by label, in place of `ATTACKS`; of each
        round, where there are several.
    accuracy
        Of the rounds' models, or of each one; those of a file where it is None were not evaluated.
    believed
        What the server takes for the number of labels, in multiples of what it is.
    other
        Further parameters, which are not swept.
    steps
        Local steps of each client, in place of ``local_steps``.
    population
        How many clients there are, of which those of a round are drawn; none are where it is 0.
    dropout
        Probability that a client's update does not arrive.
    cohort
        Members of the sum that is all the server sees of a round; 0 without secure aggregation.
    trained
        Whether the rounds are those of one training.
    adapted
        By label, the plain attack that an attack adapts.
    accumulated
        Attacks whose answers are about all updates of a client so far.
    privacy
        What the accountant says.
    bytes_on_wire
        Of each update.
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
    errors: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    accuracy: float | Sequence[float] | None = None
    believed: float = 1.0
    other: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = ()
    population: int = 0
    dropout: float = 0.0
    cohort: int = 0
    trained: bool = False
    adapted: Mapping[str, str] = field(default_factory=dict)
    accumulated: Sequence[str] = ()
    privacy: Mapping[str, Any] = field(default_factory=dict)
    bytes_on_wire: int = 400

    @property
    def updates(self) -> int:
        """How many updates the server sees of a round."""
        return 1 if self.cohort else self.clients

    def local(self, client: int) -> int:
        return self.steps[client] if self.steps else self.local_steps

    def error(self, label: str, round_: int) -> float:
        error = self.errors.get(label, ATTACKS.get(label, 0.3))
        return error if isinstance(error, (int, float)) else error[round_]

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
            "partition.kind": "shared",
            "federation.algorithm": "fedavg"
            if max(self.local_steps, *self.steps, 1) > 1
            else "fedsgd",
            "federation.fresh_model": not self.trained,
            "federation.batch_size": 8,
            "federation.attack_every": self.attack_every,
            "federation.dropout": self.dropout,
            "pretraining.steps": None,
            "attacks": [
                {"name": name, "label": name} for name in self.attacks if name not in self.adapted
            ],
            **self.other,
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


def draw_round(
    spec: Spec,
    generator: np.random.Generator,
    round_: int = 0,
    seen: dict[int, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Draw a round that follows the identities of a last layer, with attacks that err at random.

    ``seen`` holds the label counts of all updates of each client so far, and is kept up to date.
    """
    seen = {} if seen is None else seen
    rows = _draw_members(spec, generator)
    if spec.accuracy is not None:
        constant = isinstance(spec.accuracy, (int, float))
        rows["rounds/accuracy"] = np.array(spec.accuracy if constant else spec.accuracy[round_])
    attacked = round_ % spec.attack_every == 0
    answers: dict[str, list[Any]] = {}
    for update in range(spec.updates):
        members = range(spec.cohort) if spec.cohort else [update]
        arrived = [member for member in members if rows["updates/arrived"][member]]
        found = _draw_update(spec, generator, update, len(arrived), round_) if arrived else {}
        if arrived and spec.accumulated:
            identity = int(rows["updates/identity"][update])
            seen[identity] = seen.get(identity, 0) + found["truth/counts"]
            found["truth/accumulated"] = seen[identity]
            labels = np.repeat(np.arange(spec.classes), seen[identity])
            for label in spec.accumulated:
                found[spec.path(label)] = _guess(spec, generator, label, labels, round_)
        for name in _update_arrays(spec):
            answers.setdefault(name, []).append(found.get(name))
    if attacked:
        rows |= {name: _filled(spec, name, values) for name, values in answers.items()}
    return rows


def _draw_members(spec: Spec, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Draw who takes part in a round, and who drops out."""
    members = spec.cohort or spec.clients
    identities = np.arange(members)
    if spec.population:
        identities = np.sort(generator.choice(spec.population, members, replace=False))
    arrived = np.ones(members, bool)
    if spec.dropout:
        arrived = generator.random(members) >= spec.dropout
    steps = np.array([spec.local(0 if spec.cohort else member) for member in range(members)])
    return {
        "updates/identity": identities,
        "updates/local_steps": np.where(arrived, steps, -1),
        "updates/arrived": arrived,
        "updates/finite": arrived,
        "updates/bytes_on_wire": spec.bytes_on_wire * arrived,
    }


def _draw_update(
    spec: Spec, generator: np.random.Generator, update: int, members: int, round_: int
) -> dict[str, NDArray[Any]]:
    """Draw the mean update of as many members, and its truth."""
    parameters, classes, steps = spec.parameters, spec.classes, spec.local(update)
    size = parameters["federation.batch_size"]
    labels = generator.integers(classes, size=size * steps * members)
    if parameters["labels.distribution"] == "unbalanced":
        labels[: len(labels) // 2], labels[-(len(labels) // 4) or len(labels) :] = (
            generator.integers(classes, size=2)
        )
    p = np.exp(generator.normal(scale=0.3, size=(len(labels), classes)))
    p /= p.sum(axis=1, keepdims=True)
    gradient = steps * (p - np.eye(classes)[labels])
    mass = generator.normal(30, 3, size=(len(labels), 1))
    sums = (gradient * mass).mean(axis=0)
    found = {
        "truth/counts": np.bincount(labels, minlength=classes),
        "truth/posterior": p.mean(axis=0),
        "observations/row_sums": sums,
        "observations/bias_gradient": gradient.mean(axis=0),
        "observations/labels": np.array(max(1, round(spec.believed * len(labels)))),
        "observations/norm": np.linalg.norm(sums),
    }
    for label in spec.attacks:
        if label not in spec.accumulated:
            guess = _guess(spec, generator, label, labels, round_)
            if label not in spec.idle:
                found[spec.path(label)] = guess
    return found


def _guess(
    spec: Spec, generator: np.random.Generator, label: str, labels: NDArray[Any], round_: int
) -> NDArray[Any]:
    """Return what an attack answers that gets some of the labels wrong."""
    wrong = generator.random(len(labels)) < spec.error(label, round_)
    guess = np.where(wrong, generator.integers(spec.classes, size=len(labels)), labels)
    guess = np.resize(guess, max(1, round(spec.believed * len(labels))))
    counts = np.bincount(guess, minlength=spec.classes)
    answers = {"presence": counts > 0, "distribution": counts / counts.sum()}
    return answers.get(spec.answer(label), counts)


def _update_arrays(spec: Spec) -> dict[str, tuple[str, float]]:
    """Return type and fill value of all arrays of the updates that the server sees."""
    arrays: dict[str, tuple[str, float]] = {
        "truth/counts": ("i4", -1),
        "truth/posterior": ("f4", np.nan),
        "observations/row_sums": ("f4", np.nan),
        "observations/labels": ("i4", -1),
        "observations/norm": ("f4", np.nan),
    }
    if spec.bias:
        arrays["observations/bias_gradient"] = ("f4", np.nan)
    if spec.accumulated:
        arrays["truth/accumulated"] = ("i4", -1)
    return arrays | {spec.path(label): DTYPES[spec.answer(label)] for label in spec.attacks}


def _filled(spec: Spec, name: str, values: Sequence[Any]) -> NDArray[Any]:
    """Return a row of an array, with its fill value for updates without one."""
    fill = _update_arrays(spec)[name][1]
    shape = () if name in _SCALARS else (spec.classes,)
    return np.array([np.full(shape, fill) if value is None else value for value in values])


_SCALARS = ("observations/labels", "observations/norm")
_MEMBERS = {
    "updates/identity": ("i4", -1),
    "updates/local_steps": ("i4", -1),
    "updates/arrived": ("u1", 0),
    "updates/finite": ("u1", 0),
    "updates/bytes_on_wire": ("i8", -1),
}


STARTS = {"time": "S32", "ranks": "i4", "hosts": "S2048", "library": "S256", "software": "S2048"}
STARTS |= {"command": "S1024", "slurm_job": "S64", "committed": "i8"}
LOSSES = {"time": "S32", "rank": "i4", "host": "S256", "reason": "S16", "start": "i4"}
LOSSES |= {"scenario": "i4", "round": "i4", "seconds": "f8"}
# Of a run that was started once.
START = {
    "time": "2026-01-02T03:04:05+00:00",
    "ranks": 3,
    "hosts": "node1, node22",
    "library": "Open MPI 5.0.6",
    "software": '{"numpy": "2.0"}',
    "command": "testbed run x.yaml",
    "slurm_job": "4711",
    "committed": 0,
}

Row = Mapping[str, str | int | float]


class Builder:
    """A results file that is being written."""

    def __init__(
        self,
        path: Path,
        specs: Sequence[Spec],
        title: str = "A title",
        starts: Sequence[Row] = (START,),
        losses: Sequence[Row] = (),
    ) -> None:
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
        scaled(ranks, ranks, "cores", ["rank"], np.array([b"0", b"1-3,8", b""]))
        scaled(ranks, ranks, "gpu", ["rank"], np.array([b"", b"GPU-1", b"GPU-1"]))
        table(root, "starts", "start", STARTS, starts)
        table(root, "losses", "loss", LOSSES, losses)
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
        group.attrs["privacy"] = json.dumps(dict(spec.privacy))
        lengths = {"round": spec.rounds, "client": spec.updates, "class": spec.classes}
        if spec.cohort:
            lengths["member"] = spec.cohort
        for axis, length in lengths.items():
            scale(group, axis, length)
        for name in ("truth", "observations", "attacks", "rounds", "updates", "timings"):
            encode(group.create_group(name), name)
        for label in spec.attacks:
            attack = encode(group.create_group(f"attacks/{label}"), "attack")
            plain = spec.adapted.get(label, "")
            attack.attrs.update(
                name=plain or label,
                title=TITLES.get(label, f"{TITLES.get(plain, plain)}, adapted" if plain else label),
                knowledge=KNOWLEDGE.get(plain or label, "gradients"),
                source="a paper",
                options="{}",
                answers=spec.answer(label),
                observes='["row sums"]',
                assumes=json.dumps(list(spec.broken.get(label, {}))),
                broken_assumptions=json.dumps(dict(spec.broken.get(label, {}))),
                not_applicable=spec.idle.get(label, ""),
                target="accumulated" if label in spec.accumulated else "update",
                adapted=plain,
                adaptation=json.dumps(["undoes what it can"] if plain else []),
            )
        for name, (dtype, fill) in _update_arrays(spec).items():
            axes = ["round", "client"] if name in _SCALARS else ["round", "client", "class"]
            empty(group, name, {axis: lengths[axis] for axis in axes}, dtype, fill)
        if "llg" in spec.attacks:
            calibration = encode(group.create_group("attacks/llg/calibration"), "calibration")
            scaled(calibration, group, "impact", ["round"], np.full(spec.rounds, -0.5))
        member = "member" if spec.cohort else "client"
        for name, (dtype, fill) in _MEMBERS.items():
            empty(group, name, {axis: lengths[axis] for axis in ("round", member)}, dtype, fill)
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
    starts: Sequence[Row] = (START,),
    losses: Sequence[Row] = (),
) -> Path:
    """Write a whole file; rounds that are not committed hold rubbish, which shows if used."""
    builder = Builder(path, specs, title, starts, losses)
    generator = np.random.default_rng(0)
    for index, spec in enumerate(specs):
        done = spec.rounds if committed is None else committed[index]
        group = builder.file[f"scenarios/{index:04d}"]
        seen: dict[int, NDArray[Any]] = {}
        rows = [draw_round(spec, generator, round_, seen) for round_ in range(done)]
        for name in rows[0] if rows else ():
            values = group[name][:]
            for round_, row in enumerate(rows):
                if name in row:
                    values[round_] = row[name]
            values[done:] = 77
            group[name][:] = values
        builder.commit(index, done)
    builder.file.close()
    return path


def age(path: Path, version: str = "1.0") -> Path:
    """Turn a file into one of version 1.3, 1.2, 1.1 or 1.0, which said less."""
    newer: set[str] = set()
    arrays: list[str] = []
    if version in ("1.0", "1.1"):
        newer |= {"privacy", "target", "adapted", "adaptation"}
        arrays += ["observations/norm"]
        arrays += ["updates/identity", "updates/local_steps", "updates/arrived"]
    if version == "1.0":
        newer |= {"answers", "observes", "assumes", "broken_assumptions", "not_applicable"}
        arrays += ["observations/labels"]
    with h5py.File(path, "a") as file:
        del file["ranks/cores"], file["ranks/gpu"]
        if version != "1.3":
            del file["starts"], file["losses"]
        groups = [file]
        # Anything but None would end the visit.
        file.visititems(
            lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None
        )
        for group in groups:
            group.attrs["encoding-version"] = version
            for name in set(group.attrs) & newer:
                del group.attrs[name]
        for scenario in file["scenarios"].values():
            for name in arrays:
                del scenario[name]
    return path


def encode(group: h5py.Group, kind: str) -> h5py.Group:
    group.attrs["encoding-type"] = kind
    group.attrs["encoding-version"] = "1.4"
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


def table(
    root: h5py.File, name: str, axis: str, columns: Mapping[str, str], rows: Sequence[Row]
) -> None:
    """Write a table that grows."""
    group = encode(root.create_group(name), name)
    for column, dtype in {axis: "i8", **columns}.items():
        values = [number if column == axis else row[column] for number, row in enumerate(rows)]
        data = np.array(values).astype(dtype)
        dataset = group.create_dataset(column, data=data, maxshape=(None,), chunks=(8,))
        if column == axis:
            dataset.make_scale(axis)
        else:
            dataset.dims[0].attach_scale(group[axis])


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
            rows = draw_round(spec, generator, round_)
            rows["attacks/llg/counts"] = np.full((spec.clients, spec.classes), round_)
            builder.write(0, round_, rows)
            builder.commit(0, round_ + 1)
        done = int(line)
        print(done, flush=True)


if __name__ == "__main__":
    main()
