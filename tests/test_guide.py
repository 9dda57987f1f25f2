"""The guide is run as a reader would: its files are written, its commands run, its claims held."""

import json
import os
import re
from pathlib import Path

import h5py
import pytest
from launching import environment, finish

from analysis import load

GUIDE = Path(__file__).parents[1] / "docs/guide.md"
_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which every block of the guide has been run, in order."""
    where = tmp_path_factory.mktemp("guide")
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(where), str(GUIDE.parents[1])])}
    for language, text in _BLOCK.findall(GUIDE.read_text()):
        if language == "sh":
            for line in text.strip().splitlines():
                done = finish(["bash", "-c", line], cwd=where, env=env)
                assert done.status == 0, f"{line}\n{done.out}\n{done.err}"
        else:
            name = re.match(r"# file: (\S+)\n", text)
            assert name is not None, text
            (where / name[1]).write_text(text)
    return where


def test_there_is_something_to_run(folder: Path) -> None:
    languages = [language for language, _ in _BLOCK.findall(GUIDE.read_text())]
    assert {*languages} == {"python", "yaml", "sh"}
    made = {"mine.h5", "both.h5", "more.h5", "all.h5", "mine.py", "mine_too.py", "mine.yaml"}
    made |= {"damping.py", "damped.yaml", "damped.h5", "test_damping.py"}
    assert made <= {path.name for path in folder.iterdir()}
    assert len(list((folder / "figures").glob("*.png"))) >= 2


def test_the_attack_is_short() -> None:
    text = next(text for _, text in _BLOCK.findall(GUIDE.read_text()) if "class Flat" in text)
    body = text[text.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_what_the_guide_says_of_the_results(folder: Path) -> None:
    frame = load(folder / "mine.h5")
    flat = frame[(frame.attack == "Flat") & (frame.batch_size == 32)]
    means = flat.groupby("steps")[["asr", "uniform"]].mean()
    assert means["asr"][0] > 0.95
    advantage = (means["asr"] - means["uniform"]) / (1 - means["uniform"])
    assert advantage[200] < 0.25


def test_the_same_attack_replayed_is_the_same(folder: Path) -> None:
    frame = load(folder / "all.h5")
    assert {"llg_plus", "Flat", "Seen", "sharper", "aux_mean"} == set(frame.attack)
    seen = frame[frame.attack == "Seen"]["asr"].to_numpy()
    again = frame[frame.attack == "aux_mean"]["asr"].to_numpy()
    assert (seen == again).all()
    sharper = frame[frame.attack == "sharper"]["asr"].to_numpy()
    assert (sharper != frame[frame.attack == "Flat"]["asr"].to_numpy()).any()


def test_what_the_guide_says_of_the_defence(folder: Path) -> None:
    frame = load(folder / "damped.h5")
    means = frame.groupby(["scenario", "attack"]).asr.mean()
    uniform = frame.groupby("scenario").uniform.mean()
    for scenario in (1, 2):
        for fooled in ("aux_mean", "lmmse"):
            assert means[0, fooled] > uniform[0] + 0.2
            assert means[scenario, fooled] < uniform[scenario] + 0.1
            assert means[scenario, f"{fooled}+adapted"] > means[0, fooled] - 0.05
        for unmoved in ("llg", "scale_free"):
            assert means[scenario, unmoved] > uniform[scenario] + 0.15
    with h5py.File(folder / "damped.h5") as file:
        adapted = file["scenarios/0001/attacks/lmmse+adapted"].attrs["adaptation"]
    assert json.loads(adapted) == ["damp: Multiplies the last layer's gradient by the constant."]
