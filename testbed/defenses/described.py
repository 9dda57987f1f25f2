"""Lists of defences as tables and figures show them: ``top_k(0.9, tensor) + float16``."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NONE = "none"


def defense_key(value: object) -> str:
    """Return a scenario's ``defenses`` as something to group by; none at all as an empty list."""
    return json.dumps(value or [])


def defense_labels(values: Iterable[object]) -> dict[str, str]:
    """Return a label for each list of defences.

    A defence is its name and the options as they were given. Values stand without the option's
    name where they speak for themselves: a text, and a number that is the only one. Where two
    lists would share a label, theirs name every option.

    Parameters
    ----------
    values
        The parameter ``defenses`` of scenarios: lists of mappings with ``name``, or None.

    Returns
    -------
    dict[str, str]
        By `defense_key`.
    """
    lists = {defense_key(value): value or [] for value in values}
    labels = {key: _joined(value, _brief) for key, value in lists.items()}
    for shown in (_full, json.dumps):
        times = Counter(labels.values())
        labels = {
            key: label if times[label] == 1 else _joined(lists[key], shown)
            for key, label in labels.items()
        }
    return labels


def defense_label(value: object) -> str:
    """Return the label of a single list of defences."""
    return defense_labels([value])[defense_key(value)]


def named(name: str, options: Mapping[str, Any]) -> str:
    """Return something with options as ``name(value, option=value)``."""
    numbers = [value for value in options.values() if _is_number(value)]
    words = [
        _word(option, value, bare=isinstance(value, str) or len(numbers) == 1)
        for option, value in options.items()
    ]
    return f"{name}({', '.join(words)})" if words else name


def _joined(value: Any, shown: Callable[[Any], str]) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return " + ".join(map(shown, value)) or NONE


def _brief(entry: Any) -> str:
    if not isinstance(entry, Mapping) or "name" not in entry:
        return entry if isinstance(entry, str) else json.dumps(entry)
    options = {option: value for option, value in entry.items() if option != "name"}
    return named(str(entry["name"]).rpartition(":")[2], options)


def _full(entry: Any) -> str:
    if not isinstance(entry, Mapping) or "name" not in entry:
        return _brief(entry)
    words = [f"{key}={_shown(value)}" for key, value in entry.items() if key != "name"]
    return f"{entry['name']}({', '.join(words)})"


def _word(option: str, value: Any, *, bare: bool) -> str:
    if isinstance(value, bool):
        return option if value else f"no {option}"
    if bare and (isinstance(value, str) or _is_number(value)):
        return _shown(value)
    return f"{option}={_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if _is_number(value) else json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
