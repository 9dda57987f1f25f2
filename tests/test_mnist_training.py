"""MNIST and the paper's network, from its uniform start: that "trained" means trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_run import run_whole

# Plain SGD everywhere: 1000 batches of 32 images for each of two clients.
SETTINGS: dict[str, dict[str, Any]] = {
    "fedsgd": {"rounds": 1001, "evaluate_every": 200},
    "fedavg": {"algorithm": "fedavg", "local_steps": 10, "rounds": 101, "evaluate_every": 20},
}


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_mnist_is_learned_to_nine_in_ten(tmp_path: Path, data_root: Path, algorithm: str) -> None:
    federation = {"clients": 2, "batch_size": 32, "learning_rate": 0.2, "attack_every": 2000}
    run = run_whole(
        tmp_path,
        data={"name": "mnist", "root": str(data_root / "mnist"), "limit": 20000},
        model={"name": "cnn", "init": "uniform"},
        labels={"distribution": "natural"},
        federation={**federation, **SETTINGS[algorithm]},
    )
    accuracy = run["rounds/accuracy"]
    curve = accuracy[np.isfinite(accuracy)]
    assert len(curve) == 6
    assert len(run.setup.parts.test) > 3000
    assert curve[0] < 0.2
    assert curve[-1] >= 0.9
    assert run["rounds/loss"][-20:].mean() < 0.4
