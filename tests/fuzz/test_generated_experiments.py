"""Experiments near the schema, and anything as an override: accepted, or a `UserError`."""

from typing import Any

import yaml
from experiment_formats import PARTS
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import WORDS
from sandbox import controls

from testbed.describe import describe_experiment
from testbed.errors import UserError
from testbed.experiment import parse_experiment

SMALL = """\
data: {name: digits}
model: {name: cnn}
federation: {rounds: 3, clients: 2, batch_size: 4}
attacks: [llg]
"""

# No colon in a text: it would name code, which experiments may.
texts = st.sampled_from([word for word in WORDS if ":" not in word]) | st.text(
    st.characters(exclude_characters=":"), max_size=8
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from([10**40, -(10**99), 2**31, 2**63]),
    texts,
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
parts = {key: st.sampled_from(known) for key, known in PARTS.items()}
options = [
    *("rounds", "clients", "batch_size", "local_steps", "learning_rate", "root", "limit", "label"),
    *("alpha", "steps", "auxiliary_missing", "auxiliary_data", "optimizer", "zip", "name", "seed"),
]


@st.composite
def experiments(draw: st.DrawFn) -> dict[str, Any]:
    """Return an experiment of valid parts, in some of which something is replaced or put in."""
    content = {key: draw(part) for key, part in parts.items() if draw(st.booleans())}
    for key in draw(st.lists(st.sampled_from(sorted(parts)), max_size=2, unique=True)):
        part = content.get(key)
        if isinstance(part, dict) and draw(st.booleans()):
            name = draw(st.sampled_from([*part, *options]))
            content[key] = {**part, name: draw(values)}
        else:
            content[key] = draw(values)
    return content


def refused(text: str, *overrides: str) -> str:
    """Return the message of the refusal, empty where the experiment is accepted."""
    try:
        describe_experiment(parse_experiment(text, overrides))
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert not controls(message)
        assert max(map(len, message.split("\n"))) < 2500
        return message
    return ""


@settings(max_examples=80)
@given(experiments())
def test_experiments_near_the_schema(content: dict[str, Any]) -> None:
    refused(yaml.safe_dump({**yaml.safe_load(SMALL), **content}, allow_unicode=True))


@settings(max_examples=80)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    assert refused(text)


keys = st.lists(st.sampled_from([*parts, *options]) | texts, min_size=1, max_size=4).map(".".join)


@settings(max_examples=100)
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=3))
def test_overrides(pairs: list[tuple[str, Any]]) -> None:
    words = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)}"
        for key, value in pairs
    ]
    refused(SMALL, *words)


@settings(max_examples=100)
@given(texts, texts)
def test_words_on_the_command_line(key: str, value: str) -> None:
    refused(SMALL, f"{key}={value}", value)
