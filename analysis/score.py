"""What attacks and baselines score, update by update: the varying columns of the data frame."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from testbed.results.reader import Scenario

Columns = Mapping[str, NDArray[Any]]

BASELINES = ("random", "uniform", "oracle")
ACCUMULATED = "accumulated"
# What a guess would score is computed for each number of labels, in time and memory as many.
_MOST_LABELS = 1 << 20
_DEFENCES = ("defense", "defenses")
# With these an update is no sum of gradients of the cross entropy.
_ALTERED = ("federation.momentum", "federation.weight_decay", "federation.proximal")


def baseline_columns(metric: str) -> dict[str, str]:
    """Return the columns with what baselines score by a metric; empty where there are none."""
    from testbed.attacks.metrics import GUESSES

    if metric not in GUESSES:
        return {}
    return {name: name if metric == "asr" else f"{name}_{metric}" for name in BASELINES}


# Of numbers that are none, metrics are NaN: nothing to warn of.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def score_rounds(scenario: "Scenario", start: int, stop: int) -> Sequence[tuple[str, Columns]]:
    """Return the varying columns of a range of rounds for each attack; none without an update."""
    from testbed.attacks import metrics

    truth = scenario.array("truth/counts", start, stop)
    known: NDArray[np.bool_] = np.all(truth >= 0, axis=-1)
    if not known.any():
        return []
    rounds, clients = np.nonzero(known)
    truth = _counts(scenario, "truth/counts", truth[known])
    labels = truth.sum(axis=-1)
    believed = labels
    if scenario.has("observations/labels"):
        believed = scenario.array("observations/labels", start, stop)[known]
        _check_labels(scenario, "observations/labels", believed)
    accuracy = np.full(stop - start, np.nan)
    if scenario.has("rounds/accuracy"):
        accuracy = scenario.array("rounds/accuracy", start, stop)
    common = {
        "round": scenario.array("round", start, stop)[rounds],
        "client": scenario.array("client")[clients],
        "identity": _identities(scenario, start, stop)[known],
        "accuracy": accuracy[rounds],
        **_self_test(scenario, start, stop, known, truth),
    }
    targets = {"update": (truth, believed, common | _guesses(truth, believed))}
    if any(info.target == ACCUMULATED for info in scenario.attacks.values()):
        whole = scenario.array("truth/accumulated", start, stop)[known]
        whole = _counts(scenario, "truth/accumulated", whole)
        # The server takes all updates of a client to be of the size that it takes this one for.
        share = np.where(labels > 0, believed / np.maximum(labels, 1), 1)
        taken = np.maximum(np.rint(whole.sum(axis=-1) * share), 1).astype(np.int64)
        taken = np.where(believed > 0, taken, -1)
        # No sum of oracles: updates in between may not have been attacked.
        none = {
            baseline_columns(metric)["oracle"]: np.full(len(truth), np.nan)
            for metric in metrics.GUESSES
        }
        targets[ACCUMULATED] = (whole, taken, common | _guesses(whole, taken) | none)
    nothing = dict.fromkeys(metrics.METRICS, np.full(len(truth), np.nan))
    scored = []
    for label, info in scenario.attacks.items():
        right, size, columns = targets[info.target]
        values = nothing
        if not info.not_applicable:
            answers = scenario.array(f"attacks/{label}/{info.answers}", start, stop)[known]
            values = metrics.score(info.answers, right, answers, size)
        scored.append((label, {**columns, **values}))
    return scored


def _counts(scenario: "Scenario", name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    counts = values.astype(np.int64)
    _check_labels(scenario, name, counts.sum(axis=-1))
    return counts


def _check_labels(scenario: "Scenario", name: str, labels: NDArray[Any]) -> None:
    """Raise `UserError` where updates have more labels than any run has."""
    most = int(labels.max(initial=0))
    if most > _MOST_LABELS:
        raise scenario.damaged(f"{name} has {most} labels in an update")


def _guesses(truth: NDArray[np.int64], labels: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    from testbed.attacks.metrics import GUESSES

    return {
        baseline_columns(metric)[name]: expected(truth, labels)
        for metric, guesses in GUESSES.items()
        for name, expected in guesses.items()
    }


def _identities(scenario: "Scenario", start: int, stop: int) -> NDArray[np.int64]:
    """Return [round, client]: who each client is in the population; -1 for a whole cohort."""
    shape = (stop - start, scenario.clients)
    if scenario.members != scenario.clients:
        return np.full(shape, -1)
    if scenario.has("updates/identity"):
        return scenario.array("updates/identity", start, stop).astype(np.int64)
    return np.broadcast_to(np.arange(scenario.clients), shape)


def _self_test(
    scenario: "Scenario", start: int, stop: int, known: NDArray[np.bool_], truth: NDArray[Any]
) -> dict[str, NDArray[np.float64]]:
    """Return what the oracle scores, and how far the gradients are from the sum they must have."""
    from testbed.attacks import metrics

    labels = truth.sum(axis=-1)
    batch = scenario.parameters.get("federation.batch_size", 0)
    steps = _local_steps(scenario, start, stop, known, labels)
    row_sums = scenario.array("observations/row_sums", start, stop)[known]
    residual = _unbalance(row_sums)
    oracle = np.full(truth.shape, -1)
    if scenario.has("observations/bias_gradient"):
        bias = scenario.array("observations/bias_gradient", start, stop)[known]
        residual = np.fmax(residual, _unbalance(bias))
        posterior = scenario.array("truth/posterior", start, stop)[known]
        # The stored gradient is the sum over the local steps, each of which saw one batch.
        # Of a layer that is not shared, there is nothing to tell.
        if not _withholds(scenario):
            oracle = metrics.oracle_counts(posterior, bias / steps[:, None], labels)
    changed = any(
        value and (key.partition(".")[0] in _DEFENCES or key in _ALTERED)
        for key, value in scenario.parameters.items()
    )
    # A mean over steps is that over samples where all batches are of one size.
    plain = ((steps == 1) | (labels == steps * batch)) & (not changed)
    columns = {
        baseline_columns(metric)["oracle"]: metrics.METRICS[metric](truth, oracle)
        for metric in metrics.GUESSES
    }
    return {"residual": np.where(plain, residual, np.nan), **columns}


def _local_steps(
    scenario: "Scenario",
    start: int,
    stop: int,
    known: NDArray[np.bool_],
    labels: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the local steps behind each known update; of a cohort, the mean of its members."""
    if scenario.has("updates/local_steps"):
        steps = scenario.array("updates/local_steps", start, stop).astype(np.float64)
        if scenario.members != scenario.clients:
            there = steps > 0
            total = np.where(there, steps, 0).sum(axis=1, keepdims=True)
            steps = total / np.maximum(there.sum(axis=1, keepdims=True), 1)
        return np.maximum(steps[known], 1)
    batch = scenario.parameters.get("federation.batch_size", 0)  # before version 1.2
    return np.maximum(labels // batch, 1) * 1.0 if batch else np.ones(len(labels))


def _unbalance(gradients: NDArray[Any]) -> NDArray[np.float64]:
    """Return |sum| over sum of sizes, in [0, 1]; NaN where an entry is not finite, or all are 0."""
    values = np.where(np.isfinite(gradients), gradients, 0).astype(np.float64)
    size = np.abs(values).sum(axis=-1)
    valid = np.isfinite(gradients).all(axis=-1) & (size > 0)
    ratio = np.abs(values.sum(axis=-1)) / np.where(size > 0, size, 1)
    return np.where(valid, ratio, np.nan)


def _withholds(scenario: "Scenario") -> bool:
    listed = scenario.parameters.get("defenses") or ()
    return any(_name(entry) == "withhold_last_layer" for entry in listed)


def _name(entry: object) -> object:
    return entry.get("name") if isinstance(entry, Mapping) else entry
