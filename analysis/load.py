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

    from testbed.results.reader import AttackInfo, Scenario

# Parameters that every frame has as columns, swept or not.
STANDARD = {
    "data.name": "dataset",
    "labels.distribution": "distribution",
    "model.name": "model",
    "federation.batch_size": "batch_size",
}
BASELINES = ("random", "uniform", "oracle")
# Of an attack in a scenario, the same for all its updates.
ATTACK = ("attack", "title", "knowledge", "answers", "applicable", "obstacle", "broken")
_UPDATE = ("accuracy", "residual")
_DEFENCES = ("defense", "defenses")


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
        be ambiguous; ``round``, ``client``; ``attack`` (its label), ``title``, ``knowledge``,
        ``answers`` (``counts``, ``presence`` or ``distribution``), ``applicable``, ``obstacle``
        (why it is not applicable), ``broken`` (its assumptions that the scenario breaks, and what
        was found instead, as JSON); ``accuracy`` of the round's model (NaN where it was not
        evaluated), ``residual`` (see below); every metric of `testbed.attacks.metrics`, all NaN
        for an attack that is not applicable; and for the same update the expected success rate of
        a ``random`` and of a ``uniform`` guess, and the success rate of the ``oracle`` (NaN for a
        layer without bias); the same three of ``presence_f1``, with that name behind theirs.

        ``residual`` is the self-test of the gradients: their sum over the classes, which is 0 but
        for rounding, over the sum of their sizes. NaN where something must differ: where there are
        several local steps (the oracle is not exact then) or defences.

        ``attrs["columns"]`` of the frame gives the column of each dotted key.

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
                        after = _describe(label, scenario.attacks[label])
                        heads.append({**before, **after, "parameters": scenario.parameters})
                        parts.append(columns)

    names = column_names(swept, _known())
    order = ["file", "scenario", *names.values(), "round", "client", *ATTACK, *_UPDATE]
    order += [*METRICS, *_baselines()]
    if not parts:
        return pd.DataFrame(columns=order)
    for head in heads:
        parameters = head.pop("parameters")
        head.update({column: _cell(parameters.get(key)) for key, column in names.items()})
    sizes = [len(columns["round"]) for columns in parts]
    # One row per block, repeated: no column is built value by value.
    constant = pd.DataFrame(heads).loc[np.repeat(np.arange(len(heads)), sizes)]
    varying = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frame = constant.reset_index(drop=True).assign(**varying)[order]
    frame.attrs["columns"] = names
    return frame


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
    known = _known()
    return [name for name in map(str, frame.columns) if name not in known]


def varying_columns(frame: "pd.DataFrame") -> list[str]:
    """Return the parameter columns that tell scenarios of the frame apart."""
    return [name for name in parameter_columns(frame) if frame[name].nunique(dropna=False) > 1]


def baseline_columns(metric: str) -> dict[str, str]:
    """Return the columns with what baselines score by a metric; empty where there are none."""
    from testbed.attacks.metrics import GUESSES

    if metric not in GUESSES:
        return {}
    return {name: name if metric == "asr" else f"{name}_{metric}" for name in BASELINES}


def attack_names(frame: "pd.DataFrame") -> dict[str, str]:
    """Return for each attack's label what to call it: its title where that is unambiguous."""
    pairs = frame[["attack", "title"]].drop_duplicates()
    unique = not (pairs["attack"].duplicated() | pairs["title"].duplicated()).any()
    shown = pairs["title"] if unique else pairs["attack"]
    return dict(zip(pairs["attack"], shown, strict=True))


def _known() -> set[str]:
    """Return the columns that are no parameters."""
    from testbed.attacks.metrics import METRICS

    return {"file", "scenario", "round", "client", *ATTACK, *_UPDATE, *METRICS, *_baselines()}


def _baselines() -> list[str]:
    from testbed.attacks.metrics import GUESSES

    return [column for metric in GUESSES for column in baseline_columns(metric).values()]


def _describe(label: str, info: "AttackInfo") -> dict[str, Any]:
    values = (
        *(label, info.title, info.knowledge, info.answers),
        *(not info.not_applicable, info.not_applicable, json.dumps(dict(info.broken))),
    )
    return dict(zip(ATTACK, values, strict=True))


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
    labels = truth.sum(axis=-1)
    if scenario.has("observations/labels"):
        believed = scenario.array("observations/labels", start, stop)[known]
    else:
        believed = labels
    accuracy = np.full(stop - start, np.nan)
    if scenario.has("rounds/accuracy"):
        accuracy = scenario.array("rounds/accuracy", start, stop)
    common = {
        "round": scenario.array("round", start, stop)[rounds],
        "client": scenario.array("client")[clients],
        "accuracy": accuracy[rounds],
        **_self_test(scenario, start, stop, known, truth),
    }
    for metric, guesses in metrics.GUESSES.items():
        columns = baseline_columns(metric)
        common |= {columns[name]: expected(truth, believed) for name, expected in guesses.items()}
    nothing = dict.fromkeys(metrics.METRICS, np.full(len(truth), np.nan))
    scored = []
    for label, info in scenario.attacks.items():
        values = nothing
        if not info.not_applicable:
            answers = scenario.array(f"attacks/{label}/{info.answers}", start, stop)[known]
            values = metrics.score(info.answers, truth, answers, believed)
        scored.append((label, {**common, **values}))
    return scored


def _self_test(
    scenario: "Scenario", start: int, stop: int, known: NDArray[np.bool_], truth: NDArray[Any]
) -> dict[str, NDArray[np.float64]]:
    """Return what the oracle scores, and how far the gradients are from the sum they must have."""
    from testbed.attacks import metrics

    labels = truth.sum(axis=-1)
    # The stored gradient is the sum over the local steps, each of which saw one batch.
    batch = scenario.parameters.get("federation.batch_size", 0)
    steps = np.maximum(labels // batch, 1) if batch else np.ones_like(labels)
    row_sums = scenario.array("observations/row_sums", start, stop)[known]
    residual = _unbalance(row_sums)
    oracle = np.full(truth.shape, -1)
    if scenario.has("observations/bias_gradient"):
        bias = scenario.array("observations/bias_gradient", start, stop)[known]
        residual = np.fmax(residual, _unbalance(bias))
        posterior = scenario.array("truth/posterior", start, stop)[known]
        oracle = metrics.oracle_counts(posterior, bias / steps[:, None], labels)
    defended = any(
        key.partition(".")[0] in _DEFENCES and value for key, value in scenario.parameters.items()
    )
    plain = (steps == 1) & (not defended)
    columns = {
        baseline_columns(metric)["oracle"]: metrics.METRICS[metric](truth, oracle)
        for metric in metrics.GUESSES
    }
    return {"residual": np.where(plain, residual, np.nan), **columns}


def _unbalance(gradients: NDArray[Any]) -> NDArray[np.float64]:
    """Return |sum| over sum of sizes, in [0, 1]; NaN where an entry is not finite, or all are 0."""
    values = np.where(np.isfinite(gradients), gradients, 0).astype(np.float64)
    size = np.abs(values).sum(axis=-1)
    valid = np.isfinite(gradients).all(axis=-1) & (size > 0)
    ratio = np.abs(values.sum(axis=-1)) / np.where(size > 0, size, 1)
    return np.where(valid, ratio, np.nan)


def _cell(value: object) -> Any:
    """Return a parameter as something that can be grouped by."""
    return json.dumps(value) if isinstance(value, (dict, list)) else value
