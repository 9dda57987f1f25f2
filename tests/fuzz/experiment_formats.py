"""Experiment files: their text, trees near the schema, profiles, and what the command line sets."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from command_lines import testbed
from formats import Files, Format, Input
from mutate import WORDS, damage_text, damage_tree, leaf

_ROOT = Path(__file__).resolve().parents[2]
_NAME = "experiment.yaml"
# No import paths: code that an experiment names is run, and has to be.
PARTS: Mapping[str, Sequence[Any]] = {
    "data": (
        {"name": "digits"},
        {"name": "mnist"},
        {"name": "npz", "root": "x"},
        {"name": "emnist"},
    ),
    "model": ({"name": "cnn"}, {"name": "fcnn", "activation": "relu"}, {"name": "resnet20"}),
    "federation": (
        {"rounds": 3, "clients": 2, "batch_size": 8},
        {"rounds": 2, "batch_size": 4, "algorithm": "fedavg", "local_steps": 3, "momentum": 0.5},
        {
            "rounds": 2,
            "batch_size": 4,
            "server": {"optimizer": "adam", "beta1": 0.5},
            "dropout": 0.1,
        },
    ),
    "attacks": (["llg"], [{"name": "llg_plus", "label": "mine"}, "random"], ["dlg", "ldia"]),
    "defenses": (
        [],
        [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
        [{"name": "dp_sgd", "bound": 1, "noise_multiplier": 1}, "float16"],
        ["secure_aggregation"],
    ),
    "partition": ({"kind": "dirichlet", "alpha": 0.1}, {"kind": "shards", "classes_per_client": 2}),
    "adversary": ({"auxiliary_noise": 0.1}, {"auxiliary_data": "emnist", "auxiliary_root": "~/x"}),
    "pretraining": ({"steps": 5}, {"steps": 0, "batch_size": 2}),
    "compute": ({"device": "cpu", "threads": 2},),
    "results": ({"observations": "full"}, {"commit_seconds": 0}),
    "labels": ({"distribution": "unbalanced"}, {"distribution": "natural"}),
    "sweep": (
        {"federation.batch_size": [1, 2, 4], "seed": [0, 1]},
        {"zip": [{"federation.clients": [1, 2], "federation.rounds": [2, 3]}], "seed": [1]},
        {"defenses": [[], [{"name": "top_k", "theta": 0.5}]], "data": [{"name": "digits"}]},
    ),
    "profiles": ({"quick": {"federation.rounds": 1, "sweep.seed": [0, 1]}, "other": {}},),
    "seed": (0, 7),
    "title": ("A title",),
}
_NEEDED = ("data", "model", "federation", "attacks")


def tree(rng: random.Random) -> dict[str, Any]:
    """Return an experiment that is valid but for what its parts make of each other."""
    keys = [key for key in PARTS if key in _NEEDED or rng.random() < 0.35]
    return {key: rng.choice(PARTS[key]) for key in keys}


def dumped(content: Any) -> bytes:
    """Return YAML text."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(
        "utf-8", "surrogatepass"
    )


def _files() -> list[Files]:
    paths = sorted((_ROOT / "launch" / "experiments").glob("*.yaml"))
    return [{_NAME: path.read_bytes()} for path in paths]


def _small() -> list[Files]:
    return [{_NAME: dumped({key: PARTS[key][0] for key in (*_NEEDED, "sweep", "profiles")})}]


def _text(files: Files, rng: random.Random) -> Files:
    content = files[_NAME]
    if rng.random() < 0.1:
        return {_NAME: _bomb(rng)}
    return {_NAME: damage_text(content, rng)}


def _tree(_: Files, rng: random.Random) -> Input:
    content = damage_tree(tree(rng), rng)
    if rng.random() < 0.3 and isinstance(content, dict):
        content = {**content, "sweep": _sweep(rng)}
    return Input({_NAME: dumped(content)}, ["--profile=quick"] if rng.random() < 0.2 else [])


def _sweep(rng: random.Random) -> Any:
    keys = (
        "seed",
        "federation.batch_size",
        "federation.rounds",
        "model.name",
        "a.b",
        "data",
        "",
        ".",
    )
    chosen = rng.sample(keys, rng.choice((1, 2, 3)))
    large = list(range(rng.choice((1, 3, 9, 400))))
    return {key: rng.choice((large, [leaf(rng)], [1, 2], leaf(rng))) for key in chosen}


def _bomb(rng: random.Random) -> bytes:
    """Return a short text that stands for a lot."""
    start = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merged = "".join(
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    wide = "seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    return rng.choice(
        (
            start + lists,
            "m0: &m0 {a: 1}\n" + merged,
            "a: &a [*a]\n",
            "a: &a {b: *a}\n",
            "[" * rng.choice((50, 5000, 100_000)),
            "{a: " * rng.choice((50, 5000)),
            "- " * rng.choice((50, 5000)) + "a",
            "? " * 3000,
            "".join(f"{' ' * i}a:\n" for i in range(1500)),
            "a: 1\n" * rng.choice((10, 100_000)),
            "".join(f"k{i}: {i}\n" for i in range(60_000)),
            "a: '" + "x" * 3_000_000 + "'\n",
            "#" * 20_000_000,
            "\n" * 5_000_000,
            "sweep:\n" + "".join(f"  {key}{i}: [0, 1]\n" for i in range(40) for key in "ab"),
            "sweep:\n" + "".join(f"  {key}.{wide}  " for key in ("x", "y", "z"))[2:],
            "!!python/object/apply:os.system ['true']\n",
            "a: !!python/name:os.system\n",
            "a: !!binary aGVsbG8=\n",
            "a: !!set {b, c}\n",
            "--- 1\n--- 2\n",
            "%YAML 9.9\n---\na: 1\n",
            "a: 0x" + "f" * 100_000 + "\n",
            "a: 1" + "0" * 100_000 + "\n",
            "a: 1e" + "9" * 4000 + "\n",
            "seed: " + "1:" * 4000 + "1\n",
            'title: "\\ud800"\n',
            'data: {name: "\\e[2J"}\n',
            "\ufeffa: 1\n",
        )
    ).encode("utf-8", "surrogatepass")


_KEYS = (
    *("seed", "title", "federation.rounds", "federation.batch_size", "data.root", "data.name"),
    *("sweep.seed", "sweep", "sweep.zip", "attacks", "defenses", "model.arguments.x", "model.name"),
    *("federation", "federation.server.momentum", "adversary.auxiliary_root", "partition.alpha"),
    *("results.commit_seconds", "compute.threads", "profiles.x", "a", "a.b.c", "", ".", "a..b"),
    *("a." * 100 + "a", "a." * 20_000 + "a", "federation.rounds.x", "attacks.0", "__class__", "é"),
)


def _overrides(files: Files, rng: random.Random) -> Input:
    words = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = rng.choice((*WORDS, dumped(leaf(rng)).decode("utf-8", "surrogatepass"), "[1, 2]"))
        words.append(f"{rng.choice(_KEYS)}={value}" if rng.random() < 0.95 else value)
    if rng.random() < 0.2:
        words.append(f"--profile={rng.choice(('quick', 'quik', *WORDS))}")
    # What no command line can hold.
    words = [
        word.replace("\0", "").encode("utf-8", "surrogateescape")
        for word in words
        if word.isascii()
    ] + [word.replace("\0", "").encode("utf-8", "replace") for word in words if not word.isascii()]
    return Input(files, [word.decode("utf-8", "surrogateescape")[:120_000] for word in words])


def _check(folder: Path, arguments: Sequence[str]) -> None:
    testbed("check", str(folder / _NAME), *arguments)


def _share(folder: Path, arguments: Sequence[str]) -> None:
    """Read the command line of a run, and make the plan of its share."""
    from testbed.__main__ import _parser
    from testbed.experiment import load_experiment
    from testbed.plan import make_plan

    words = ["run", str(folder / _NAME), "-o", "x.h5", *arguments]
    options = _parser().parse_args(words)
    plans = make_plan(load_experiment(options.experiment, options.overrides), options.share)
    assert len(plans) <= 6


FORMATS = {
    form.name: form
    for form in (
        Format("experiment", _files, _check, _tree, share=0.6, lines=True),
        Format("experiment-text", _files, _check, _text, share=0.6, lines=True),
        Format("overrides", _small, _check, _overrides, lines=True),
    )
}
