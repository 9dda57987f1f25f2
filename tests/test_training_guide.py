"""The page on training and defences: its fragments and commands are run, its tables held."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import yaml
from launching import environment, finish

from analysis import load
from testbed.data.partition import PARTITIONS
from testbed.defenses import Stage, defenses
from testbed.run import RunOptions, run
from testbed.sections import FederationSection, PartitionSection
from testbed.transport.local import LocalTransport

PAGE = Path(__file__).parents[1] / "docs/training.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
FRAGMENTS = [text for language, text in BLOCKS if language == "yaml" and "# file:" not in text]
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def base() -> dict[str, Any]:
    (text,) = [text for _, text in BLOCKS if text.startswith("# file: training.yaml")]
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table under a heading line, cells without their backticks."""
    _, _, rest = TEXT.partition(heading + "\n|---")
    assert rest, heading
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run_merged(path: Path, sections: Mapping[str, Any], **federation: Any) -> Path:
    """Run the page's file with sections in place of its own, as the page says; a few rounds."""
    content = {key: value for key, value in base().items() if key != "profiles"}
    content |= sections
    asked = sections.get("federation", {})
    content["federation"] = base()["federation"] | asked | federation
    (path / "e.yaml").write_text(yaml.safe_dump(content))
    options = RunOptions(path / "e.yaml", (), path / "r.h5", overwrite=True, progress="none")
    assert run(LocalTransport(), options) == 0
    return path / "r.h5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the page's file was written and its commands were run."""
    where = tmp_path_factory.mktemp("training")
    env = {**environment(), "PYTHONPATH": str(PAGE.parents[1])}
    for _, text in BLOCKS:
        name = re.match(r"# file: (\S+)\n", text)
        if name:
            (where / name[1]).write_text(text)
    for line in COMMANDS:
        done = finish(["bash", "-c", line], cwd=where, env=env)
        assert done.status == 0, f"{line}\n{done.out}\n{done.err}"
    return where


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda text: " ".join(text.split())[:60])
def test_every_fragment_runs(fragment: str, tmp_path: Path) -> None:
    sections = yaml.safe_load(fragment)
    path = run_merged(tmp_path, sections, rounds=2, attack_every=1, evaluate_every=1)
    with h5py.File(path) as file:
        assert file["committed_rounds"][:].tolist() == [2]
        if "dp_sgd" in fragment:
            assert '"epsilon"' in file["scenarios/0000"].attrs["privacy"]


def test_there_is_something_to_run(folder: Path) -> None:
    assert len(FRAGMENTS) >= 12
    made = {"training.h5", "defences.h5", "tradeoff.png", "figures"}
    assert made <= {path.name for path in folder.iterdir()}
    assert list((folder / "figures").glob("*.png"))


def test_what_the_page_says_of_the_labels_of_attacks(folder: Path) -> None:
    frame = load(folder / "defences.h5")
    labels = set(frame.attack)
    assert {"llg", "llg+adapted", "llg+rounds"} <= labels
    assert not {name for name in labels if name.startswith("random+")}
    # One that learns from error feedback what came later knows more than from a single update.
    assert set(frame[frame.attack == "llg+rounds"].target) == {"accumulated"}
    with h5py.File(folder / "defences.h5") as file:
        withheld = file["scenarios/0007/attacks/llg"].attrs
        assert withheld["not_applicable"] == "the last layer is withheld"


def test_what_leaks_is_trained(folder: Path) -> None:
    frame = load(folder / "training.h5")
    last = frame["round"] == frame["round"].max()
    assert frame[last].accuracy.iloc[0] > 0.6
    assert (
        frame[frame.attack == "llg"].asr > frame[frame.attack == "llg"].random + 0.1
    ).mean() > 0.9


def test_the_table_of_defences_is_that_of_the_program() -> None:
    rows = table("| name | works on | an attacker who knows of it |")
    expected = [
        [f"`{name}`", one.stage.name.lower(), one.adaptation or "has nothing to adapt to"]
        for name, one in defenses().items()
    ]
    assert rows == expected


def test_the_order_of_the_list_is_that_of_the_program() -> None:
    order = re.sub(r"\s+", " ", TEXT)
    start = order.index("the one of a client's work")
    places = [order.index(f"`{stage.name.lower()}`", start) for stage in Stage]
    assert places == sorted(places)


def test_the_tables_of_kinds_are_complete() -> None:
    first = "| `partition.kind` | a client's samples | source |"
    kinds = [row[0].strip("`") for row in table(first)]
    assert kinds == ["shared", *PARTITIONS]
    assert kinds == list(get_args(PartitionSection.model_fields["kind"].annotation))
    first = (
        "| `federation.batch_norm` | clients normalise by | running statistics "
        "| evaluation normalises by | the server sees |"
    )
    modes = [row[0].strip("`") for row in table(first)]
    assert modes == list(get_args(FederationSection.model_fields["batch_norm"].annotation))


@pytest.mark.parametrize(("cell", "size"), table("| defences | bytes |"))
def test_the_bytes_on_the_wire_are_those_of_the_page(cell: str, size: str, tmp_path: Path) -> None:
    sections = {"defenses": yaml.safe_load(cell.strip("`")), "attacks": ["random"]}
    path = run_merged(tmp_path, sections, rounds=1, evaluate_every=0)
    with h5py.File(path) as file:
        sent = file["scenarios/0000/updates/bytes_on_wire"][:]
    assert np.ptp(sent) == 0
    assert sent[0, 0] == int(size.replace(",", ""))
