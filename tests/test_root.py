"""What the root tells of the ranks that a run has lost."""

import time
from contextlib import closing
from pathlib import Path

import pytest
from small_run import RANKS, header_of, plan_of, resolve, setups_for

from testbed.checkpoint import Checkpoints
from testbed.failure import Position
from testbed.results.reader import open_results
from testbed.results.writer import ResultsWriter
from testbed.root import Root
from testbed.signals import StopSignal
from testbed.transport.base import Lost


def test_a_checkpoint_that_cannot_be_removed_does_no_harm(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "r.h5", "run", 60)
    checkpoints.path.mkdir()
    pretrained = tmp_path / "r.h5.pretrained"
    pretrained.touch()
    checkpoints.remove()
    assert not pretrained.exists()


def test_ranks_that_are_lost_together_are_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, path = plan_of(), tmp_path / "r.h5"
    header = header_of(plan, setups_for([plan]).make(plan))
    writer = ResultsWriter(path, attributes={}, ranks=RANKS, scenarios=[header])
    root = Root(
        writer,
        Checkpoints(path, "run", 60),
        resolve().experiment,
        [plan],
        Position(0, 2),
        StopSignal(),
        "none",
    )
    with closing(root):
        root.lost([Lost(1, "a", stuck=False), Lost(2, "b", stuck=True)], time.monotonic(), 1)
        assert capfd.readouterr().err == (
            "rank 1 on a has died, rank 2 on b does not answer and was killed, scenario 0, "
            "round 2: going on with 1 rank\n"
        )
        root._tell_losses()
    with open_results(path) as results:
        told = [(loss.rank, loss.host, loss.reason, loss.round) for loss in results.losses]
    assert told == [(1, "a", "killed", 2), (2, "b", "stuck", 2)]
