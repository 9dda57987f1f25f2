"""Results files as one tidy data frame: what every table and figure starts from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.score import ACCUMULATED, baseline_columns, score_rounds
from analysis.shares import ShareFile, share_file, share_sets
from testbed.defenses.described import defense_key, defense_labels
from testbed.errors import UserError

# h5py and pandas are imported where they are used: `analysis --help` needs neither.
if TYPE_CHECKING:
    import pandas as pd

    from testbed.results.reader import Scenario
    from testbed.results.records import AttackInfo

# Parameters that every frame has as columns, swept or not.
STANDARD = {
    "data.name": "dataset",
    "labels.distribution": "distribution",
    "model.name": "model",
    "federation.batch_size": "batch_size",
}
DEFENSES = "defenses"
# Of an attack in a scenario, the same for all its updates.
ATTACK = (
    *("attack", "title", "knowledge", "answers", "target", "adapted"),
    *("applicable", "obstacle", "broken"),
)
# Why a scenario with committed rounds has no rows, and what helps.
_NOTHING_CAME, _NO_ATTACKS = "no update arrived to be attacked", "no attack was run"
_REMEDIES = {
    _NOTHING_CAME: "more rounds or a lower federation.dropout",
    _NO_ATTACKS: "attacks",
}
_KEYS = ("round", "client", "identity")
_UPDATE = ("accuracy", "residual")
# Of the title of an attack that knows the defences.
_ADAPTED = ", adapted"
# Keys whose last part alone says too little.
_NAMES = {"partition.kind": "partition"}


def load(*paths: str | Path) -> "pd.DataFrame":
    """Return one row per file, scenario, round, client and attack.

    Rounds that were not attacked (``federation.attack_every``) have no rows, nor have clients that
    dropped out; updates that were not attacked because they held NaN or Inf have rows whose metrics
    are NaN. With secure aggregation the one client of a round is the cohort.

    Parameters
    ----------
    paths
        Results files, complete or not; committed rounds are read. A name that is there twice is
        read once.

    Returns
    -------
    pandas.DataFrame
        Columns, in this order: ``file``, ``scenario``; ``dataset``, ``distribution``, ``model``,
        ``batch_size`` and every other swept key under its last part, or in full where that would
        be ambiguous; ``defenses`` (where a scenario has some) in short, as
        `defense_labels` has them; ``round``, ``client``, ``identity`` (of the client in the
        population; -1 for a cohort); ``attack`` (its label), ``title``,
        ``knowledge``, ``answers`` (``counts``, ``presence`` or ``distribution``), ``target``
        (``update``, or ``accumulated``: scored against the labels of all updates of the client so
        far), ``adapted`` (the plain attack that it adapts to the defences; empty for a plain one),
        ``applicable``, ``obstacle`` (why it is not applicable), ``broken`` (its assumptions that
        the scenario breaks, and what was found instead, as JSON); ``accuracy`` of the round's model
        (NaN where it was not evaluated), ``residual`` (see below); every metric of
        `testbed.attacks.metrics`, all NaN for an attack that is not applicable; and for the same
        truth the expected success rate of a ``random`` and of a ``uniform`` guess, and the success
        rate of the ``oracle`` (NaN for a layer without bias, and for the target ``accumulated``);
        the same three of ``presence_f1``, with that name behind theirs.

        ``residual`` is the self-test of the gradients: their sum over the classes, which is 0 but
        for rounding, over the sum of their sizes. NaN where the oracle need not be exact: where
        there are defences, batches of different sizes, or local steps that are not plain gradient
        descent.

        ``attrs`` of the frame: ``columns``, the column of each dotted key; ``sets``, the sets of
        shares that the files are, as `analysis.shares.share_sets` returns them; ``trained``, file
        and number of the scenarios whose rounds are those of one training; ``lost``, file and
        number of those with committed rounds and no rows, and why; ``complete``, whether all files
        are.

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
    # Of each scenario its file and number, what was swept, and its defences.
    settings: list[tuple[str, int, Iterable[str], object]] = []
    files: list[ShareFile] = []
    trained: list[tuple[str, int]] = []
    lost: list[tuple[str, int, str]] = []
    complete = True
    for path in dict.fromkeys(map(str, paths)):
        with open_results(path) as results:
            files.append(share_file(path, results))
            complete &= results.complete
            for scenario in results.scenarios:
                found = len(parts)
                defenses = scenario.parameters.get(DEFENSES)
                settings.append((path, scenario.number, tuple(scenario.swept), defenses))
                before = {"file": path, "scenario": scenario.number}
                for block in scenario.blocks():
                    for label, columns in score_rounds(scenario, *block):
                        after = _describe(label, scenario.attacks[label])
                        heads.append({**before, **after, "parameters": scenario.parameters})
                        parts.append(columns)
                if is_trained(scenario):
                    trained.append((path, scenario.number))
                if scenario.committed and len(parts) == found:
                    why = _NOTHING_CAME if scenario.attacks else _NO_ATTACKS
                    lost.append((path, scenario.number, why))

    sets = share_sets(files)
    # In the order of the sweep, in which one file with all scenarios would have them.
    order_of = {file: place for place, one in enumerate(sets) for file in one.files}
    settings.sort(key=lambda setting: (order_of[setting[0]], setting[1]))
    lost.sort(key=lambda scenario: (order_of[scenario[0]], scenario[1]))
    swept = dict.fromkeys(key for _, _, keys, _ in settings for key in keys)
    defended = [defenses for *_, defenses in settings]
    if any(defended):
        swept[DEFENSES] = None
    names = column_names(swept, _known())
    order = ["file", "scenario", *names.values(), *_KEYS, *ATTACK, *_UPDATE]
    order += [*METRICS, *_baselines()]
    told: dict[str, Any] = {"columns": names, "sets": tuple(sets), "trained": trained}
    told |= {"lost": lost, "complete": complete}
    if not parts:
        empty = pd.DataFrame(columns=order)
        empty.attrs.update(told)
        return empty
    shown = defense_labels(defended)
    for head in heads:
        parameters = head.pop("parameters")
        head.update({column: _cell(parameters.get(key)) for key, column in names.items()})
        if DEFENSES in names:
            head[names[DEFENSES]] = shown[defense_key(parameters.get(DEFENSES))]
    sizes = [len(columns["round"]) for columns in parts]
    # One row per block, repeated: no column is built value by value.
    constant = pd.DataFrame(heads).loc[np.repeat(np.arange(len(heads)), sizes)]
    varying = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frame = constant.reset_index(drop=True).assign(**varying)[order]
    frame.attrs.update(told)
    return frame


def load_attacked(*paths: str | Path) -> "pd.DataFrame":
    """Return what `load` does, or raise `UserError` where that is not a single row."""
    frame = load(*paths)
    if not frame.empty:
        return frame
    named = ", ".join(map(str, paths))
    reasons = dict.fromkeys(why for *_, why in frame.attrs["lost"])
    if frame.attrs["complete"]:
        raise UserError(
            f"{named}: {' or '.join(reasons)} in any round, and the run is complete: run it again "
            f"with {' and '.join(_REMEDIES[why] for why in reasons)}"
        )
    raise UserError(
        f"{named}: no round with an attack has been committed yet: try again when the run is "
        "further; `show` says how far it is"
    )


def is_trained(scenario: "Scenario") -> bool:
    """Return whether the rounds of a scenario are those of one training."""
    return scenario.parameters.get("federation.fresh_model", True) is False


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
    last = [_NAMES.get(key, key.rpartition(".")[2]) for key in keys]
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


def attack_names(frame: "pd.DataFrame") -> dict[str, str]:
    """Return for each attack's label what to call it: its title where that is unambiguous.

    In the order of the frame, but each adapted attack behind the plain one, and behind that the
    one on all updates so far.
    """
    import pandas as pd

    rows = frame[["attack", "title", "target", "adapted"]].drop_duplicates()
    # Where a defence gives nothing to adapt to, the attack on all rounds has the plain one's title.
    title = rows["title"].str.removesuffix(_ADAPTED)
    suffix = np.where(rows["target"] == ACCUMULATED, f", {ACCUMULATED}", _ADAPTED)
    title = title + np.where(rows["adapted"] != "", suffix, "")
    rows = rows.assign(title=title).drop_duplicates(["attack", "title"])
    first = rows.drop_duplicates("attack")
    first = pd.concat(
        [first[first["target"] != ACCUMULATED], first[first["target"] == ACCUMULATED]]
    )
    unique = not (rows["attack"].duplicated() | rows["title"].duplicated()).any()
    names = dict(zip(first["attack"], first["title"] if unique else first["attack"], strict=True))
    plain = dict(zip(first["attack"], first["adapted"], strict=True))
    return {label: names[label] for label in family_order(names, plain)}


def family_order(labels: Iterable[str], plain: Mapping[str, str]) -> list[str]:
    """Return attacks in their order, but each adapted one behind the plain one.

    Parameters
    ----------
    labels
        Of the attacks.
    plain
        By label, that of the attack that it adapts.
    """
    known = list(labels)

    def family(label: str) -> list[str]:
        return [label] + [member for one in known if plain[one] == label for member in family(one)]

    return [label for root in known if plain[root] not in known for label in family(root)]


def of_updates(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the rows about single updates, or all where every one is about several of a client.

    Guesses differ between the two: the labels of many updates are easier to guess.
    """
    rows = frame[frame["target"] != ACCUMULATED]
    return frame if rows.empty else rows


def _known() -> set[str]:
    """Return the columns that are no parameters."""
    from testbed.attacks.metrics import METRICS

    return {"file", "scenario", *_KEYS, *ATTACK, *_UPDATE, *METRICS, *_baselines()}


def _baselines() -> list[str]:
    from testbed.attacks.metrics import GUESSES

    return [column for metric in GUESSES for column in baseline_columns(metric).values()]


def _describe(label: str, info: "AttackInfo") -> dict[str, Any]:
    values = (
        *(label, info.title, info.knowledge, info.answers, info.target, info.adapted),
        *(not info.not_applicable, info.not_applicable, json.dumps(dict(info.broken))),
    )
    return dict(zip(ATTACK, values, strict=True))


def _cell(value: object) -> Any:
    """Return a parameter as something that can be grouped by."""
    return json.dumps(value) if isinstance(value, (dict, list)) else value
