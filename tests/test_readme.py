"""What the README shows is what the program does."""

import re
from pathlib import Path

from launching import run_testbed, write_experiment

from analysis import load

README = Path("README.md").read_text()


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
