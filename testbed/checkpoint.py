"""What a run needs to go on where it was: saved now and then, removed when the run is complete.

Of every draw the stream is known, so a scenario's later rounds depend on few things: the global
model, the server's optimiser, sums over the rounds, and what clients remember. Without them the
rounds are done again from the first one, to the same bits; with them from the checkpoint on.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError
from testbed.results.container import Container, read_container, write_container
from testbed.transport.base import ClientState

CHECKPOINT, MODELS = "checkpoint", "pretrained models"
# A checkpoint is not written more often than costs this part of the time.
_SHARE = 0.05

# A training, its steps, and the number of the model.
ModelKey = tuple[str, int, int]


@dataclass(frozen=True)
class ScenarioState:
    """Everything that a scenario's rounds from some round on depend on, beside the experiment.

    Attributes
    ----------
    round
        The next round.
    model
        float32 [P + S]: the global model of that round.
    optimizer
        Of the server, by name, float32 [P].
    accumulated
        Sums over the rounds; see `testbed.accumulation`.
    clients
        What clients remember, by identity.
    """

    round: int
    model: NDArray[np.float32]
    optimizer: Mapping[str, NDArray[np.float32]]
    accumulated: Mapping[str, NDArray[Any]]
    clients: Mapping[int, ClientState]


class Checkpoints:
    """The files beside a results file from which its run can go on.

    Parameters
    ----------
    results
        The results file's final name.
    run
        Stands in the results file too: what is of another run is not used.
    seconds
        Time between two checkpoints, at least.

    Attributes
    ----------
    path
        Of the checkpoint.
    """

    def __init__(self, results: Path, run: str, seconds: float) -> None:
        self.path = checkpoint_path(results)
        self._models_path = results.with_name(results.name + ".pretrained")
        self._run = run
        self._pause = seconds
        self._written_at = self._models_at = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return time.monotonic() - self._written_at >= self._pause

    def models_due(self) -> bool:
        """Return whether it is time to save trained models."""
        return time.monotonic() - self._models_at >= self._pause

    def write(self, scenario: int, state: ScenarioState) -> None:
        """Save a scenario's state, by its number in the results file; see `write_container`."""
        arrays: dict[str, NDArray[Any]] = {"model": state.model}
        arrays |= {f"optimizer/{name}": array for name, array in state.optimizer.items()}
        arrays |= {f"accumulated/{name}": array for name, array in state.accumulated.items()}
        for identity, remembered in sorted(state.clients.items()):
            arrays |= {f"clients/{identity}/{name}": a for name, a in sorted(remembered.items())}
        content = {"run": self._run, "scenario": scenario, "round": state.round}
        started = time.monotonic()
        write_container(self.path, Container(CHECKPOINT, content, arrays))
        self._written_at = time.monotonic()
        spent = self._written_at - started
        # Where it takes long, the next one waits.
        self._written_at += max(0.0, spent / _SHARE - self._pause)

    def read(self, scenario: int) -> ScenarioState | None:
        """Return what was saved of a scenario; None if nothing was.

        Raises
        ------
        UserError
            The file is damaged, or cannot be read.
        """
        if not self.path.exists():
            return None
        container = read_container(self.path, CHECKPOINT)
        content = container.content
        if content.get("run") != self._run or content.get("scenario") != scenario:
            return None
        try:
            return _scenario_state(container)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{self.path}: this checkpoint makes no sense: {error}") from None

    def write_models(self, models: Mapping[ModelKey, NDArray[np.float32]]) -> None:
        """Save models that were trained before the first round, float32 [P + S] each."""
        content = {"run": self._run, "models": [list(key) for key in models]}
        arrays = {str(place): model for place, model in enumerate(models.values())}
        started = time.monotonic()
        write_container(self._models_path, Container(MODELS, content, arrays))
        self._models_at = time.monotonic()
        spent = self._models_at - started
        self._models_at += max(0.0, spent / _SHARE - self._pause)

    def read_models(self) -> dict[ModelKey, NDArray[np.float32]]:
        """Return the models that were saved.

        Raises
        ------
        UserError
            The file is damaged, or cannot be read.
        """
        if not self._models_path.exists():
            return {}
        container = read_container(self._models_path, MODELS)
        if container.content.get("run") != self._run:
            return {}
        try:
            return {
                (str(key), int(steps), int(number)): _vector(
                    f"model {place}", container.arrays[str(place)]
                )
                for place, (key, steps, number) in enumerate(container.content["models"])
            }
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{self._models_path}: these models make no sense: {error}") from None

    def remove(self) -> None:
        """Remove the files, where that can be: the run is complete, or begins anew.

        What stays does no harm: a checkpoint says of which run it is.
        """
        for path in (self.path, self._models_path):
            for left in (path, path.with_name(path.name + ".new")):
                with contextlib.suppress(OSError):
                    left.unlink()


def checkpoint_path(results: Path) -> Path:
    """Return the name of the checkpoint of a results file."""
    return results.with_name(results.name + ".checkpoint")


def _scenario_state(container: Container) -> ScenarioState:
    parts: dict[str, dict[str, NDArray[Any]]] = {"optimizer": {}, "accumulated": {}}
    clients: dict[int, ClientState] = {}
    for path, array in container.arrays.items():
        kind, _, name = path.partition("/")
        if kind == "clients":
            identity, _, name = name.partition("/")
            clients.setdefault(int(identity), {})[name] = _vector(path, array).copy()
        elif kind != "model":
            parts[kind][name] = array
    round_ = container.content["round"]
    if not isinstance(round_, int) or round_ < 0:
        raise ValueError(f"its round is {round_!r}")
    return ScenarioState(
        round=round_,
        model=_vector("model", container.arrays["model"]),
        optimizer={name: _vector(name, array) for name, array in parts["optimizer"].items()},
        accumulated=parts["accumulated"],
        clients=clients,
    )


def _vector(name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype != np.float32 or array.ndim != 1:
        raise ValueError(f"{name} is no float32 vector")
    return array
