"""What `check` and `list` print."""

from pathlib import Path

import numpy as np
import pytest
from small_run import plan_of, resolve, setups_for

from testbed.attacks import attacks
from testbed.data import DATASETS
from testbed.describe import describe_experiment, describe_known
from testbed.errors import UserError
from testbed.models.catalog import MODELS
from testbed.results.schema import PHASES

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def table(text: str) -> list[dict[str, str]]:
    """Return the rows of the table that a line of dashes begins."""
    lines = text.splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("--"))
    starts = [0] + [i + 2 for i in range(len(lines[rule])) if lines[rule][i : i + 2] == "  "]
    stops: list[int | None] = [*starts[1:], None]

    def cells(line: str) -> list[str]:
        return [line[start:stop].strip() for start, stop in zip(starts, stops, strict=True)]

    body = lines[rule + 1 :]
    body = body[: body.index("")] if "" in body else body
    return [dict(zip(cells(lines[rule - 1]), cells(line), strict=True)) for line in body]


def facts(text: str) -> dict[str, str]:
    """Return the lines below the table, by their first words."""
    below = text.split("\n\n")[-2].splitlines()
    return {line[:14].strip(): line[14:] for line in below}


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def test_scenarios_and_totals() -> None:
    text = describe_experiment(
        resolve(
            "title=A title", "sweep.federation.rounds=[4, 2]", "sweep.federation.clients=[3, 5]"
        )
    )
    assert text.splitlines()[0] == "A title"
    rows = table(text)
    assert [row["scenario"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["rounds"] for row in rows] == ["4", "4", "2", "2"]
    assert [row["clients"] for row in rows] == ["3", "5", "3", "5"]
    assert [row["labels"] for row in rows] == ["4"] * 4
    assert rows[1]["what"] == "federation.rounds=4, federation.clients=5"
    totals = facts(text)
    assert totals["scenarios"] == "4"
    assert totals["rounds"] == "12"
    assert totals["updates"] == str(4 * 3 + 4 * 5 + 2 * 3 + 2 * 5)
    assert totals["compute"] == "device=auto, threads=1 per rank"
    size = sum(in_bytes(row["size"]) for row in rows)
    assert totals["results file"].startswith("at most ")
    total = totals["results file"].removeprefix("at most ").partition(" when complete")[0]
    assert in_bytes(total) == pytest.approx(size, rel=0.01)


def test_one_scenario() -> None:
    assert [row["what"] for row in table(describe_experiment(resolve()))] == ["the only one"]


def test_many_scenarios_are_cut_and_counted() -> None:
    text = describe_experiment(resolve(f"sweep.seed={list(range(45))}"))
    assert "seed=39\n... and 5 more\n" in text
    assert "seed=40" not in text
    assert facts(text)["scenarios"] == "45"


@pytest.mark.parametrize("name", ["cnn", "fcnn"])
def test_length_of_an_update_is_that_on_the_wire(name: str) -> None:
    (row,) = table(describe_experiment(resolve(f"model.name={name}")))
    plan = plan_of(f"model.name={name}")
    layout = setups_for([plan]).make(plan).layout
    assert in_bytes(row["update"]) == pytest.approx(4 * layout.size, rel=0.005)


def test_last_layers_make_the_file_larger() -> None:
    sizes = []
    for kept in ("summary", "last_layer"):
        (row,) = table(describe_experiment(resolve(f"results.observations={kept}")))
        sizes.append(in_bytes(row["size"]))
    # 3 rounds, 2 clients, 10 classes, 48 features of the CNN on 8x8 images; two more datasets.
    values = 3 * 2 * 10 * 48 * 4 + 48 * 8
    assert sizes[1] - sizes[0] == pytest.approx(values + 2 * 2000, abs=200)


def test_own_model_has_an_unknown_update() -> None:
    text = describe_experiment(resolve("model.name=my.module:make"))
    (row,) = table(text)
    assert row["update"] == "unknown"
    assert in_bytes(row["size"]) > 0
    own = "model.name=my.module:make", "results.observations=last_layer"
    text = describe_experiment(resolve(*own))
    assert table(text)[0]["size"] == "unknown"
    assert facts(text)["results file"].startswith("unknown (1 of 1 scenarios")


def test_own_data(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    overrides = ("data.name=npz", f"data.root={path}", "model.name=lenet")
    (row,) = table(describe_experiment(resolve(*overrides)))
    assert (row["update"], row["size"]) == ("unknown", "unknown")
    labels = np.arange(40) % 2
    np.savez(path, images=np.zeros((40, 12, 12), np.uint8), labels=labels)
    (row,) = table(describe_experiment(resolve(*overrides)))
    assert in_bytes(row["update"]) > 0
    np.savez(path, images=np.zeros((40, 4, 4), np.uint8), labels=labels)
    with pytest.raises(UserError, match="'lenet' cannot take images of 1x4x4"):
        describe_experiment(resolve(*overrides))


def test_size_grows_with_the_rounds() -> None:
    sizes = []
    for rounds in (1000, 2000):
        overrides = (f"federation.rounds={rounds}", "federation.clients=100")
        (row,) = table(describe_experiment(resolve(*overrides)))
        sizes.append(in_bytes(row["size"]))
    # Five arrays of 4 bytes for each class, ten for each client; loss, accuracy, phases, attack.
    client = 5 * 10 * 4 + (5 * 4 + 3 * 8 + 2 * 1)
    assert sizes[1] - sizes[0] == pytest.approx(
        1000 * (100 * client + 8 * (3 + len(PHASES))), rel=0.01
    )


def test_no_size_is_shown_in_powers_of_ten() -> None:
    shown = set()
    for clients in range(3500, 3950, 4):
        overrides = ("federation.rounds=1", f"federation.clients={clients}")
        (row,) = table(describe_experiment(resolve(*overrides)))
        shown.add(row["size"])
    assert {size.split()[1] for size in shown} == {"kB", "MB"}
    assert not any("e" in size for size in shown)


@pytest.mark.parametrize(
    ("kind", "names"), [("attacks", attacks()), ("models", MODELS), ("datasets", DATASETS)]
)
def test_lists_have_all_names(kind: str, names: dict[str, object]) -> None:
    listed = [row["name"] for row in table(describe_known(kind))]
    if kind == "models":
        assert listed.pop() == "package.module:callable"
    assert listed == list(names)


def test_list_of_attacks_tells_options_and_knowledge() -> None:
    rows = {row["name"]: row for row in table(describe_known("attacks"))}
    assert rows["random"]["options"] == "-"
    assert rows["llg"]["options"] == "variant=corrected"
    assert "dummy=zeros" in rows["llg_star"]["options"]
    assert rows["llg_star"]["knows"] == "model"
    assert rows["llg_plus"]["knows"] == "auxiliary"
    assert rows["llg"]["knows"] == "gradients"


def test_list_of_datasets_tells_shapes_and_roots() -> None:
    rows = {row["name"]: row for row in table(describe_known("datasets"))}
    assert (rows["mnist"]["classes"], rows["mnist"]["image"]) == ("10", "1x28x28")
    assert (rows["digits"]["data.root"], rows["npz"]["data.root"]) == ("-", "file")
    assert rows["npz"]["classes"] == "of the file"


def test_what_attacks_presume_and_will_not_find_is_noted() -> None:
    text = describe_experiment(
        resolve(
            "attacks=[llg, idlg, batchnorm]",
            "sweep={federation.batch_size: [1, 8], model.name: [cnn, resnet20]}",
        )
    )
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: not run, since no BatchNorm statistics come with the updates "
        "(in 2 of 4 scenarios: batchnorm)",
        "note: one label per update: assumed, and does not hold (in 2 of 4 scenarios: idlg)",
    ]


def test_what_is_said_of_several_attacks_is_said_once() -> None:
    shifted = ("adversary.auxiliary_noise=0.1", "adversary.batch_size=estimated")
    text = describe_experiment(resolve("attacks=[llg, llg_plus, aux_mean]", *shifted))
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert any(note.endswith("(in 1 of 1 scenarios: llg_plus, aux_mean)") for note in notes)
    assert any(note.endswith("(in 1 of 1 scenarios: llg, llg_plus, aux_mean)") for note in notes)


def test_whole_updates_are_in_the_size() -> None:
    sizes = {}
    for kept in ("summary", "last_layer", "full"):
        overrides = (f"results.observations={kept}", "model.name=fcnn", "federation.rounds=50")
        (row,) = table(describe_experiment(resolve(*overrides)))
        sizes[kept] = in_bytes(row["size"])
        update = in_bytes(row["update"])
    pages = -(-2 * 4 * 10 * 588 // 4096)  # of a round of two clients
    assert sizes["last_layer"] - sizes["summary"] == pytest.approx(50 * pages * 4096, rel=0.02)
    assert sizes["full"] - sizes["last_layer"] == pytest.approx(
        102 * update, rel=0.01
    )  # and an axis
