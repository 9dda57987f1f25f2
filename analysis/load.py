"""Results files as one tidy data frame: what every table and figure starts from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError

# h5py and pandas are imported where they are used: `analysis --help` needs neither.
if TYPE_CHECKING:
    import pandas as pd

    from testbed.results.reader import Scenario

# Parameters that every frame has as columns, swept or not.
STANDARD = {
    "data.name": "dataset",
    "labels.distribution": "distribution",
    "model.name": "model",
    "federation.batch_size": "batch_size",
}
BASELINES = ("random", "uniform", "oracle")
_IDENTITY = ("file", "scenario", "round", "client", "attack", "title", "knowledge")


def load(*paths: str | Path) -> "pd.DataFrame":
    """Return one row per file, scenario, round, client and attack.

    Rounds that were not attacked (``federation.attack_every``) have no rows; updates that were not
    attacked because they held NaN or Inf have rows whose metrics are NaN.

    Parameters
    ----------
    paths
        Results files, complete or not; committed rounds are read.

    Returns
    -------
    pandas.DataFrame
        Columns, in this order: ``file``, ``scenario``; ``dataset``, ``distribution``, ``model``,
        ``batch_size`` and every other swept key under its last part, or in full where that would
        be ambiguous; ``round``, ``client``; ``attack`` (its label), ``title``, ``knowledge``;
        every metric of `testbed.attacks.metrics`; and for the same update the expected success
        rate of a ``random`` and of a ``uniform`` guess, and the success rate of the ``oracle``
        (NaN for a layer without bias).

    Raises
    ------
    UserError
        A file cannot be read.
    """
    import pandas as pd

    from testbed.attacks.metrics import METRICS
    from testbed.results.reader import open_results

    heads: list[dict[str, Any]] = []
    parts: list[Mapping[str, NDArray[Any]]] = []
    swept: dict[str, None] = {}
    for path in paths:
        with open_results(path) as results:
            for scenario in results.scenarios:
                swept.update(dict.fromkeys(scenario.swept))
                before = {"file": str(path), "scenario": scenario.index}
                for block in scenario.blocks():
                    for label, columns in _score(scenario, *block):
                        info = scenario.attacks[label]
                        after = {
                            "attack": label,
                            "title": info.title,
                            "knowledge": info.knowledge,
                        }
                        heads.append({**before, **after, "parameters": scenario.parameters})
                        parts.append(columns)

    names = column_names(swept, {*_IDENTITY, *BASELINES, *METRICS})
    order = [
        *("file", "scenario", *names.values(), "round", "client", "attack", "title", "knowledge"),
        *(*METRICS, *BASELINES),
    ]
    if not parts:
        return pd.DataFrame(columns=order)
    for head in heads:
        parameters = head.pop("parameters")
        head.update({column: _cell(parameters.get(key)) for key, column in names.items()})
    sizes = [len(columns["round"]) for columns in parts]
    # One row per block, repeated: no column is built value by value.
    constant = pd.DataFrame(heads).loc[np.repeat(np.arange(len(heads)), sizes)]
    varying = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return constant.reset_index(drop=True).assign(**varying)[order]


def load_attacked(*paths: str | Path) -> "pd.DataFrame":
    """Return what `load` does, or raise `UserError` where that is not a single row."""
    frame = load(*paths)
    if frame.empty:
        files = ", ".join(map(str, paths))
        raise UserError(
            f"{files}: no round with an attack has been committed yet: try again when the run is "
            "further; `show` says how far it is"
        )
    return frame


def column_names(swept: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Return a column name for each standard and each swept key.

    Parameters
    ----------
    swept
        Dotted keys.
    taken
        Names of other columns.

    Returns
    -------
    dict[str, str]
        The last part of a key, or the whole key where that part is taken or stands for two keys.
    """
    # Where a data set lies on some machine is no property of the scenario.
    keys = [key for key in swept if key not in STANDARD and key != "data.root"]
    last = [key.rpartition(".")[2] for key in keys]
    used = {*taken, *STANDARD.values()}
    short = [name not in used and last.count(name) == 1 for name in last]
    return STANDARD | {
        key: name if good else key for key, name, good in zip(keys, last, short, strict=True)
    }


def parameter_columns(frame: "pd.DataFrame") -> list[str]:
    """Return the columns that hold parameters of the scenario, in the order of the frame."""
    from testbed.attacks.metrics import METRICS

    known = {*_IDENTITY, *BASELINES, *METRICS}
    return [name for name in map(str, frame.columns) if name not in known]


def varying_columns(frame: "pd.DataFrame") -> list[str]:
    """Return the parameter columns that tell scenarios of the frame apart."""
    return [name for name in parameter_columns(frame) if frame[name].nunique(dropna=False) > 1]


def attack_names(frame: "pd.DataFrame") -> dict[str, str]:
    """Return for each attack's label what to call it: its title where that is unambiguous."""
    pairs = frame[["attack", "title"]].drop_duplicates()
    unique = not (pairs["attack"].duplicated() | pairs["title"].duplicated()).any()
    shown = pairs["title"] if unique else pairs["attack"]
    return dict(zip(pairs["attack"], shown, strict=True))


def _score(
    scenario: "Scenario", start: int, stop: int
) -> Sequence[tuple[str, Mapping[str, NDArray[Any]]]]:
    """Return the varying columns of a range of rounds for each attack."""
    from testbed.attacks import metrics

    truth = scenario.array("truth/counts", start, stop)
    known: NDArray[np.bool_] = np.all(truth >= 0, axis=-1)
    if not known.any():
        return []
    rounds, clients = np.nonzero(known)
    truth = truth[known].astype(np.int64)
    common = {
        "round": scenario.array("round", start, stop)[rounds],
        "client": scenario.array("client")[clients],
        "random": metrics.expected_random_asr(truth),
        "uniform": metrics.expected_uniform_asr(truth),
        "oracle": _oracle(scenario, start, stop, known, truth),
    }
    scored = []
    for label in scenario.attacks:
        inferred = scenario.array(f"attacks/{label}/counts", start, stop)[known]
        values = {name: metric(truth, inferred) for name, metric in metrics.METRICS.items()}
        scored.append((label, {**common, **values}))
    return scored


def _oracle(
    scenario: "Scenario", start: int, stop: int, known: NDArray[np.bool_], truth: NDArray[Any]
) -> NDArray[np.float64]:
    from testbed.attacks import metrics

    if not scenario.has("observations/bias_gradient"):
        return np.full(len(truth), np.nan)
    posterior = scenario.array("truth/posterior", start, stop)[known]
    bias = scenario.array("observations/bias_gradient", start, stop)[known]
    labels = truth.sum(axis=-1)
    # The stored gradient is the sum over the local steps, each of which saw one batch.
    batch = scenario.parameters.get("federation.batch_size", 0)
    steps = np.maximum(labels // batch, 1) if batch else np.ones_like(labels)
    return metrics.asr(truth, metrics.oracle_counts(posterior, bias / steps[:, None], labels))


def _cell(value: object) -> Any:
    """Return a parameter as something that can be grouped by."""
    return json.dumps(value) if isinstance(value, (dict, list)) else value
