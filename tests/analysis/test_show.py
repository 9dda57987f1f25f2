import json

import h5py
import numpy as np
import pytest
from build_file import START, Builder, Spec, age, build, paper_sweep
from sharing import share

from analysis.show import show


def test_a_complete_file(tmp_path):
    path = build(tmp_path / "run.h5", paper_sweep(2), title="On digits")
    text = show(path)
    lines = text.splitlines()
    assert lines[0] == "On digits"
    for fact in (
        "complete (32 of 32 rounds, 100 %)",
        "2026-01-02T03:04:05+00:00",
        "label-leakage-testbed 0.1.0",
        "0123456789abcdef0123456789abcdef01234567+",
        "Open MPI 5.0.6",
        "4711",
        "3 ranks on 2 hosts",
        "1 client on node1, cuda:0 NVIDIA H200, CPUs 1-3,8",
        "2 client on node22, cuda:0 NVIDIA H200",
        "numpy 2.0",
        "testbed run x.yaml",
    ):
        assert fact in text
    assert "LLG+" in text
    assert "knows auxiliary" in text
    assert lines[-1].split() == ["15", "unbalanced", "128", "2", "10", "2/2"]
    head = next(line for line in lines if "labels.distribution" in line)
    assert head.split()[-3:] == ["clients", "classes", "rounds"]


def test_how_far_an_incomplete_file_is(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=100), Spec(rounds=100)], committed=[100, 99])
    text = show(tmp_path / "run.h5")
    assert "incomplete" in text
    assert "199 of 200 rounds, 99 %" in text
    assert "99/100" in text
    assert "run.h5.partial" in text


def test_nothing_committed_yet(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=7)], committed=[0])
    assert "0 of 7 rounds, 0 %" in show(tmp_path / "run.h5.partial")


def test_all_committed_but_never_closed(tmp_path):
    build(tmp_path / "run.h5.partial", [Spec(rounds=3)])
    assert "has not closed the file (3 of 3 rounds, 100 %)" in show(tmp_path / "run.h5")


def test_what_is_not_known_is_said(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=1)], title="")
    with h5py.File(path, "a") as file:
        for name in ("git_commit", "mpi_library", "slurm_job"):
            file.attrs[name] = ""
    text = show(path)
    assert text.startswith("(untitled)\n")
    for fact in ("commit     unknown", "MPI        none (a single process)", "Slurm job  none"):
        assert f"  {fact}\n" in text


@pytest.mark.parametrize("ranks", [9, 64])
def test_many_ranks_are_counted_by_device(tmp_path, ranks):
    builder = Builder(tmp_path / "run.h5", [Spec(rounds=1)])
    group = builder.file["ranks"]
    devices = [b"cpu"] + [b"cuda:%d NVIDIA H200" % (i % 8) for i in range(ranks - 1)]
    columns = {
        "rank": list(range(ranks)),
        "host": [b"node%d" % (i // 8) for i in range(ranks)],
        "device": devices,
        "role": [b"client"] * ranks,
        "local_rank": [0] * ranks,
        "cores": [b""] * ranks,
        "gpu": [b"GPU-0"] * 2 + [b""] * (ranks - 2),
    }
    for name, column in columns.items():
        del group[name]
        group[name] = np.array(column)
    builder.file.close()
    text = show(tmp_path / "run.h5")
    assert f"{ranks} ranks on {-(-ranks // 8)} hosts" in text
    assert f"{ranks - 1} x NVIDIA H200, 1 x cpu" in text
    assert "ranks 0-1 share a GPU of node0" in text


def test_obstacles_are_told_once_for_all_scenarios_that_share_them(tmp_path):
    lone, signs = "one label per update", "non-negative features"
    specs = [
        Spec(
            {"federation.batch_size": size},
            rounds=1,
            attacks=["llg", "llg_plus", "lone", "norms"],
            idle={"norms": "no BatchNorm statistics come with the updates"},
            broken={
                **({"lone": {lone: f"{size} labels per update"}} if size > 1 else {}),
                **({"llg": {signs: "-1"}, "llg_plus": {signs: "-1"}} if size in (1, 4, 8) else {}),
            },
        )
        for size in (1, 2, 4, 8)
    ]
    lines = show(build(tmp_path / "run.h5", specs)).splitlines()
    at = lines.index("not applicable")
    idle = "  no BatchNorm statistics come with the updates  norms  in all scenarios"
    assert lines[at + 1 : at + 4] == [idle, "", "broken assumptions"]
    assert [line.split() for line in lines[at + 4 : at + 7]] == [
        [*signs.split(), "llg,", "llg_plus", "in", "scenarios", "0,", "2-3", "-1"],
        [
            *(*lone.split(), "lone", "in", "scenarios", "1-3"),
            *("2", "labels", "per", "update", "...", "8", "labels", "per", "update"),
        ],
        [],
    ]


def test_no_obstacles_are_not_mentioned(tmp_path):
    text = show(build(tmp_path / "run.h5", [Spec(rounds=1)]))
    assert "not applicable" not in text
    assert "broken" not in text


def section(text, head):
    lines = text.splitlines()
    at = lines.index(head)
    return [line.split("  ") for line in lines[at + 1 : lines.index("", at)]]


def test_how_clients_train_and_defend_themselves(tmp_path):
    top_k = [{"name": "top_k", "theta": 0.9}, {"name": "float16"}]
    averaging = {
        "federation.algorithm": "fedavg",
        "federation.local_steps": 10,
        "federation.local_epochs": None,
        "federation.proximal": 0.01,
        "federation.population": 40,
        "federation.server.optimizer": "adam",
        "federation.server.learning_rate": 0.1,
    }
    dirichlet = {
        "partition.kind": "dirichlet",
        "partition.alpha": 0.5,
        "partition.classes_per_client": None,
    }
    specs = [
        Spec(rounds=2),
        Spec(
            {"federation.algorithm": "fedavg"},
            rounds=5,
            clients=20,
            attacks=["llg", "llg+adapted", "llg+rounds"],
            adapted={"llg+adapted": "llg", "llg+rounds": "llg"},
            accumulated=["llg+rounds"],
            dropout=0.3,
            privacy={"epsilon": 3.14159, "delta": 1e-5, "accountant": "rdp", "note": "as if"},
            other={**averaging, **dirichlet, "defenses": top_k},
        ),
    ]
    text = show(build(tmp_path / "run.h5", specs))
    with h5py.File(tmp_path / "run.h5") as file:
        lost = int((file["scenarios/0001/updates/arrived"][:] == 0).sum())
    assert lost > 0

    def stripped(head):
        return [[cell.strip() for cell in line if cell.strip()] for line in section(text, head)]

    assert stripped("training") == [
        ["fedsgd, 2 clients", "in scenario 0"],
        [
            "fedavg, local steps 10, proximal 0.01, server adam, rate 0.1, 20 clients of 40",
            "in scenario 1",
        ],
    ]
    assert stripped("partition") == [
        ["shared", "in scenario 0"],
        ["dirichlet(0.5)", "in scenario 1"],
    ]
    assert stripped("defences") == [
        ["none", "in scenario 0"],
        ["top_k(0.9) + float16", "in scenario 1"],
    ]
    assert stripped("adapted attacks") == [["undoes what it can", "in scenario 1"]]
    assert stripped("privacy") == [
        ["epsilon 3.142 at delta 1e-05 (accountant rdp): as if", "in scenario 1"]
    ]
    assert stripped("drop-outs") == [[f"{lost} of 100 updates did not arrive", "in scenario 1"]]
    attacks = {line[0]: line for line in stripped("attacks")}
    assert "knows gradients and the defences" in attacks["llg+adapted"]
    assert "answers counts of all updates so far" in attacks["llg+rounds"]
    assert "knows gradients" in attacks["llg"]


def test_what_older_files_do_not_say_is_not_mentioned(tmp_path):
    path = age(build(tmp_path / "run.h5", [Spec(rounds=1)]), "1.1")
    with h5py.File(path, "a") as file:
        attributes = file["scenarios/0000"].attrs
        told = json.loads(attributes["parameters"])
        kept = {key: value for key, value in told.items() if "algorithm" not in key}
        attributes["parameters"] = json.dumps(
            {key: value for key, value in kept.items() if not key.startswith("partition")}
        )
    lines = show(path).splitlines()
    for head in ("training", "partition", "defences", "privacy", "drop-outs", "adapted attacks"):
        assert head not in lines


def test_swept_defences_are_a_column_and_cohorts_have_their_members(tmp_path):
    specs = [
        Spec({"defenses": value}, rounds=1, cohort=cohort)
        for value, cohort in (([], 0), ([{"name": "secure_aggregation"}], 12))
    ]
    lines = show(build(tmp_path / "run.h5", specs)).splitlines()
    assert [line.split() for line in lines[-3:]] == [
        ["#", "defenses", "clients", "classes", "rounds"],
        ["0", "none", "2", "10", "1/1"],
        ["1", "secure_aggregation", "12", "10", "1/1"],
    ]
    assert "defences" not in lines


def test_scenarios_of_a_share_have_their_numbers_in_the_sweep(tmp_path):
    specs = [
        Spec(
            {"federation.batch_size": size},
            rounds=1,
            attacks=["llg", "lone", "idle"],
            idle={"idle": "no bias"} if size == 8 else {},
            broken={"lone": {"one label": "more"}} if size == 8 else {},
            dropout=0.5 * (size == 8),
        )
        for size in (1, 2, 4, 8)
    ]
    text = show(share(tmp_path, specs, "run", (1, 2)))
    assert [line[2] for line in text.splitlines()[-2:]] == ["1", "3"]
    for head in ("not applicable", "broken assumptions", "drop-outs"):
        (line,) = section(text, head)
        assert "in scenario 3" in line


def test_starts_and_lost_ranks_are_told(tmp_path):
    again = {**START, "time": "2026-01-03T00:00:00+00:00", "ranks": 2, "slurm_job": "4712"}
    lost = {"time": "t", "rank": 1, "host": "node1", "reason": "killed", "start": 0}
    lost |= {"scenario": 0, "round": 3, "seconds": 0.51234}
    stuck = {**lost, "rank": 2, "host": "node22", "reason": "stuck", "start": 1, "scenario": 1}
    specs = [Spec({"federation.batch_size": size}, rounds=8) for size in (1, 2)]
    starts = [START, {**again, "committed": 5}]
    path = build(tmp_path / "run.h5", specs, starts=starts, losses=[lost, stuck])
    lines = [line.split() for line in show(path).splitlines()]
    assert ["started", "2", "times"] in lines
    assert ["2026-01-02T03:04:05+00:00", "with", "3", "ranks,", "Slurm", "job", "4711"] in lines
    told = "2026-01-03T00:00:00+00:00 with 2 ranks, after 5 rounds, Slurm job 4712"
    assert told.split() in lines
    assert ["lost", "2", "ranks"] in lines
    where = "rank 1 on node1, killed during start 1 at round 3 of scenario 0"
    assert f"{where}; the run went on after 0.51 s".split() in lines
    where = "rank 2 on node22, stuck during start 2 at round 3 of scenario 1"
    assert f"{where}; the run went on after 0.51 s".split() in lines


def test_a_run_that_was_started_once_and_lost_nothing_says_nothing_of_it(tmp_path):
    for path in (
        build(tmp_path / "run.h5", [Spec(rounds=2)]),
        age(build(tmp_path / "old.h5", [Spec(rounds=2)]), "1.2"),
    ):
        words = show(path).split()
        assert "started" not in words
        assert "lost" not in words


def test_of_many_losses_the_first_and_the_last_are_told(tmp_path):
    loss = {"time": "t", "host": "node1", "reason": "killed", "start": 0, "scenario": 0}
    losses = [{**loss, "rank": rank, "round": 2, "seconds": 1.0} for rank in range(30)]
    text = show(build(tmp_path / "run.h5", [Spec(rounds=4)], losses=losses))
    assert "30 ranks" in text
    for rank in range(30):
        told = f"rank {rank} on node1, killed at round 2; the run went on after 1 s"
        assert (told in text) == (rank < 4 or rank >= 26)
    assert "... 22 more ..." in text
