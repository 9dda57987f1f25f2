"""What a run goes on from: its checkpoint, and the models trained before its first round."""

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from formats import Files, Format
from mutate import damage, damage_tree

from testbed.checkpoint import Checkpoints, ScenarioState

_MAGIC, _RUN = len(b"label-leakage-testbed container 1\n"), "a run"
_BODY = _MAGIC + 32


def seeds() -> list[Files]:
    """Return both files, of a training in which clients remember something."""
    vector = np.arange(50, dtype=np.float32)
    state = ScenarioState(
        round=3,
        model=vector,
        optimizer={"momentum": vector},
        accumulated={"counts": np.ones((2, 4), np.int64), "identities": np.arange(2)},
        clients={1: {"residual": vector}, 7: {"residual": vector, "momentum": vector}},
    )
    with tempfile.TemporaryDirectory() as folder:
        files = _checkpoints(Path(folder))
        files.write(0, state)
        files.write_models({("training", 5, 0): vector, ("training", 9, 1): vector})
        return [{path.name: path.read_bytes() for path in Path(folder).iterdir()}]


def resealed(files: Files, rng: random.Random) -> Files:
    """Damage one of the files; in most cases with a checksum that is right again."""
    name = rng.choice(sorted(files))
    content = files[name]
    if rng.random() < 0.15:
        return {**files, name: damage(content, rng)}
    body = content[_BODY:]
    if rng.random() < 0.6:
        length = int.from_bytes(body[:8], "little")
        text = json.dumps(damage_tree(json.loads(body[8 : 8 + length]), rng)).encode()
        body = len(text).to_bytes(8, "little") + text + body[8 + length :]
    else:
        body = damage(body, rng)
    return {**files, name: content[:_MAGIC] + hashlib.sha256(body).digest() + body}


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "run.h5", _RUN, 60.0)


def _read(folder: Path, _: Sequence[str]) -> None:
    found = _checkpoints(folder)
    found.read(0)
    found.read_models()


FORMATS = {"checkpoint": Format("checkpoint", seeds, _read, resealed)}
