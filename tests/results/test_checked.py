"""A results file from anywhere: nothing outside of it is opened, no claim of it believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from build_file import Spec, build, scaled

from testbed.attacks import Knowledge
from testbed.errors import UserError
from testbed.results.events import STARTS
from testbed.results.reader import open_results
from testbed.results.schema import KNOWLEDGE

SCENARIO = "scenarios/0000"
COUNTS = f"{SCENARIO}/truth/counts"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build(tmp_path / "run.h5", [Spec(rounds=3)])


def read(path: Path) -> None:
    with open_results(path) as results:
        for scenario in results.scenarios:
            for name in ("truth/counts", "attacks/llg/counts", "updates/finite"):
                if scenario.has(name):
                    scenario.array(name)


def refusal(path: Path, edit: Callable[[h5py.File], object]) -> str:
    read(path)
    with h5py.File(path, "a") as file:
        edit(file)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def replaced(name: str, make: Callable[[h5py.File], Any]) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        made = make(file)
        del file[name]
        file[name] = made

    return edit


@pytest.mark.parametrize("name", ["scenarios", SCENARIO, f"{SCENARIO}/truth", COUNTS, "ranks/host"])
def test_links_are_not_followed(path: Path, name: str) -> None:
    other = build(path.with_name("other.h5"), [Spec(rounds=3)])
    for link in (h5py.ExternalLink(other.name, f"/{name}"), h5py.SoftLink(f"/{name}x")):
        target = build(path.with_name("linked.h5"), [Spec(rounds=3)])
        with h5py.File(target, "a") as file:
            file[f"{name}x"] = file[name]
        message = refusal(target, replaced(name, lambda _, link=link: link))
        assert f"{name} is a link" in message


def test_elements_in_other_files_are_not_read(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_bytes(b"\1" * 10_000)

    def outside(file: h5py.File) -> None:
        shape, dtype = file[COUNTS].shape, file[COUNTS].dtype
        del file[COUNTS]
        size = int(np.prod(shape)) * dtype.itemsize
        file.create_dataset(COUNTS, shape, dtype, external=[(str(secret), 0, size)])

    assert "truth/counts has its elements in other places" in refusal(path, outside)


def test_virtual_datasets_are_refused(path: Path) -> None:
    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(file[COUNTS].shape, "i4")
        layout[...] = h5py.VirtualSource(file[f"{SCENARIO}/attacks/llg/counts"])
        del file[COUNTS]
        file.create_virtual_dataset(COUNTS, layout)

    assert "truth/counts has its elements in other places" in refusal(path, virtual)


def test_pieces_larger_than_the_array_are_refused(path: Path) -> None:
    def large(file: h5py.File) -> None:
        shape = file[COUNTS].shape
        del file[COUNTS]
        chunks, most = (1 << 22, *shape[1:]), (None, *shape[1:])
        file.create_dataset(COUNTS, shape, "i4", chunks=chunks, maxshape=most, compression=1)

    assert "truth/counts has pieces of 335544320 bytes" in refusal(path, large)


def test_arrays_in_pieces_that_were_never_written_are_refused(path: Path) -> None:
    """HDF5 takes memory for each, 730 MB for these."""

    def scatter(file: h5py.File) -> None:
        table = file.require_group("starts")
        table.attrs["encoding-type"], table.attrs["encoding-version"] = "starts", "1.4"
        for name, dtype in {"start": "i8", **STARTS}.items():
            if name in table:
                del table[name]
            length = 1 << 20 if name == "ranks" else 1
            table.create_dataset(name, (length,), dtype, chunks=(9 if length > 1 else 1,))

    assert "starts/ranks announces 116508 pieces, most of them never written" in refusal(
        path, scatter
    )


def test_attacks_know_one_of_five_things(path: Path) -> None:
    def rename(file: h5py.File) -> None:
        file[f"{SCENARIO}/attacks/llg"].attrs["knowledge"] = "gradientZ"

    assert "attacks/llg knows 'gradientZ'" in refusal(path, rename)
    assert tuple(knowledge.value for knowledge in Knowledge) == KNOWLEDGE


def test_arrays_that_the_file_cannot_hold_are_refused(path: Path) -> None:
    with h5py.File(path, "a") as file:
        group = file[SCENARIO]
        for name in ("round", "truth/counts"):
            del group[name]
        group.create_dataset("round", (1 << 30,), "i8", chunks=(9,)).make_scale("round")
        made = group.create_dataset("truth/counts", (1 << 30, 2, 10), "i4", chunks=(9, 2, 10))
        for place, axis in enumerate(("round", "client", "class")):
            made.dims[place].attach_scale(group[axis])
        file["committed_rounds"][0] = 1 << 30
    with open_results(path) as results, pytest.raises(UserError) as caught:
        results.scenarios[0].array("truth/counts")
    assert "announces 85899345920 bytes, the file holds 0 of it" in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "dtype"),
    [
        (("round", "client"), "i4"),
        (("client", "round", "class"), "i4"),
        (("round", "client", "class"), "f4"),
    ],
)
def test_arrays_have_the_axes_and_the_type_of_the_format(
    path: Path, axes: tuple[str, ...], dtype: str
) -> None:
    def other(file: h5py.File) -> None:
        group = file[SCENARIO]
        del group["truth/counts"]
        shape = tuple(len(group[axis]) for axis in axes)
        scaled(group, group, "truth/counts", axes, np.zeros(shape, dtype))

    assert "/truth/counts is " in refusal(path, other)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation.batch_size", "8"),
        ("federation.batch_size", -1),
        ("federation.batch_size", 1 << 70),
        ("federation.learning_rate", float("nan")),
        ("data.name", 3),
        ("attacks", [3]),
        ("defenses", {"name": "clip"}),
        ("federation.fresh_model", "no"),
    ],
)
def test_parameters_that_no_experiment_has_are_refused(path: Path, key: str, value: Any) -> None:
    def edit(file: h5py.File) -> None:
        told = json.loads(file[SCENARIO].attrs["parameters"])
        file[SCENARIO].attrs["parameters"] = json.dumps({**told, key: value})

    assert f"the parameter {key!r} is" in refusal(path, edit)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("swept", "[]"),
        ("swept", "{"),
        ("swept", 3),
        ("swept", np.bytes_(b"\xff")),
        ("privacy", "[" * 100 + "]" * 100),
        ("number", -1),
        ("number", "0"),
        ("draws", 0.5),
    ],
)
def test_attributes_of_another_type_are_refused(path: Path, name: str, value: Any) -> None:
    def edit(file: h5py.File) -> None:
        file[SCENARIO].attrs[name] = value

    assert f"the attribute {name!r}" in refusal(path, edit)


def test_two_scenarios_of_the_same_number_are_refused(path: Path) -> None:
    def edit(file: h5py.File) -> None:
        file.copy(file[SCENARIO], file["scenarios"], "0001")
        file["scenarios/0001"].attrs["number"] = 0
        file["scenarios/0000"].attrs["number"] = 0

    assert "two scenarios of the same number" in refusal(path, edit)


def test_names_are_printed_without_what_a_terminal_obeys(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from analysis.__main__ import main

    with h5py.File(path, "a") as file:
        file.attrs["title"] = "a \x1b[2J title"
        file[f"{SCENARIO}/attacks/llg"].attrs["title"] = "LLG\x1b[31m"
    for command in ("show", "table"):
        assert main([command, str(path)]) == 0
        out = capsys.readouterr().out
        assert "\\x1b[31m" in out or command == "table"
        assert "\x1b" not in out
