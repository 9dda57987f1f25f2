"""What the README shows is what the program does."""

import re
import shlex
from pathlib import Path

import pytest
from launching import run_here, run_testbed, write_experiment

from analysis import load
from analysis.tradeoff import tradeoff

README = Path("README.md").read_text()


@pytest.mark.ranks
def test_the_attack_in_the_readme_runs_beside_the_others(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    experiment = write_experiment(
        tmp_path / "e.yaml",
        federation={"rounds": 30, "fresh_model": True, "batch_size": 8},
        attacks=["llg", "mine:Bias", {"name": "mine:Bias", "label": "sure", "confidence": 0.9}],
    )
    done = run_testbed("run", experiment, "-o", "r.h5", ranks=2, cwd=tmp_path)
    assert done.status == 0, done.err
    frame = load(tmp_path / "r.h5")
    assert set(frame.attack) == {"llg", "Bias", "sure"}
    success = frame.groupby("attack").asr.mean()
    assert success["Bias"] > frame.random.mean()
    assert success["sure"] != success["Bias"]


def test_every_command_and_link_of_the_readme_exists():
    for script in re.findall(r"^    (\./\S+)", README, re.MULTILINE):
        assert Path(script).stat().st_mode & 0o100
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert Path(target).exists(), target
    for experiment in re.findall(r"launch/experiments/\S+\.yaml", README):
        assert Path(experiment).exists()


def test_every_experiment_is_in_the_table():
    listed = re.findall(r"^\| `(\w+\.yaml)` \|", README, re.MULTILINE)
    there = {path.name for path in Path("launch/experiments").glob("*.yaml")}
    assert set(listed) == there
    assert len(listed) == len(there)


def test_the_training_with_defences_weighs_leakage_against_bytes(tmp_path):
    (line,) = re.findall(r"^    python -m testbed (run .*?[^\\])\n    python", README, re.M | re.S)
    words = shlex.split(line.replace("\\\n", " "))
    words[words.index("-o") + 1] = str(tmp_path / "defences.h5")
    done = run_here(*words)
    assert done.status == 0, done.err
    table = tradeoff(load(tmp_path / "defences.h5"))
    plain = table[table.kind == "plain"].set_index(["distribution", "defenses"])
    assert {"none", "dgc(0.99)", "signsgd", "secure_aggregation"} == set(plain.index.levels[1])
    assert (plain["mean"] > plain["uniform"]).all()
    assert {"adapted", "accumulated"} < set(table.kind)
    bytes_sent = plain["bytes"].groupby("defenses").first()
    assert bytes_sent["dgc(0.99)"] < bytes_sent["signsgd"] < bytes_sent["none"]
    assert plain["accuracy"].notna().all()
