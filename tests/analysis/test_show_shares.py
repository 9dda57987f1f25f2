import h5py
from build_file import START, Spec, build
from sharing import share, shares

from analysis.show import show
from analysis.show_shares import show_all

SPECS = [Spec({"federation.batch_size": n}, rounds=4, dropout=float(n == 8)) for n in (1, 2, 4, 8)]


def fact(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {name} "))
    return line.removeprefix(f"  {name}").strip()


def section(text, head):
    lines = text.splitlines()
    at = lines.index(head)
    return [line.split() for line in lines[at + 1 : lines.index("", at)]]


def test_complete_shares_are_described_as_one_run(tmp_path):
    (text,) = show_all(shares(tmp_path, SPECS, 2)[::-1])
    assert text.splitlines()[0] == "A title"
    assert fact(text, "files") == str(tmp_path / "run_*of2.h5")
    assert fact(text, "shares") == "2 of 2"
    assert fact(text, "state") == "complete (16 of 16 rounds, 100 %)"
    assert fact(text, "ranks") == "6 ranks on 2 hosts: node1 (4), node22 (2), over all shares"
    assert fact(text, "devices") == "4 x NVIDIA H200, 2 x cpu"
    assert fact(text, "software") == "label-leakage-testbed 0.1.0"
    tail = "complete 8/8 rounds 3 ranks on 2 hosts Slurm job 4711"
    lines = [" ".join(line) for line in section(text, "shares")]
    assert lines == [f"{i}/2 run_{i}of2.h5 {tail}" for i in range(2)]
    # From here on as in a single file.
    whole = show(build(tmp_path / "whole.h5", SPECS))
    assert text[text.index("\nattacks\n") :] == whole[whole.index("\nattacks\n") :]
    assert "did not arrive  in scenario 3" in text


def test_missing_and_incomplete_shares_are_told(tmp_path):
    first = share(tmp_path, SPECS, "run_0of4", (0, 4))
    second = share(tmp_path, SPECS, "run_2of4", (2, 4), committed=[3])
    (text,) = show_all([first, second])
    assert fact(text, "shares") == "2 of 4"
    assert fact(text, "state") == (
        "incomplete: shares are missing (7 of 8 rounds of those that are there)"
    )
    lines = [line.strip() for line in text.splitlines()]
    assert "shares 1, 3 of 0-3 are not among the files, with 2 of the 4 scenarios" in lines
    assert "share 2 of 0-3 is incomplete, with 3 of 4 rounds" in lines
    assert [line[:4] for line in section(text, "shares")] == [
        ["0/4", "run_0of4.h5", "complete", "4/4"],
        ["2/4", "run_2of4.h5.partial", "incomplete", "3/4"],
    ]
    paths = [first, second, *(share(tmp_path, SPECS, f"run_{i}of4", (i, 4)) for i in (1, 3))]
    (text,) = show_all(paths)
    assert fact(text, "state") == (
        "incomplete: still being written, or runs were stopped (15 of 16 rounds, 93 %)"
    )


def test_shares_that_have_no_scenario_do_not_count(tmp_path):
    paths = [share(tmp_path, SPECS, f"run_{i}of9", (i, 9)) for i in range(4)]
    (text,) = show_all(paths)
    assert fact(text, "shares") == "4 of 4"
    assert fact(text, "state").startswith("complete")


def test_what_differs_between_shares_is_told_of_each(tmp_path):
    paths = shares(tmp_path, SPECS, 4)
    with h5py.File(paths[2], "a") as file:
        file.attrs["software_version"] = "0.2.0"
        file.attrs["created"] = "2026-01-05T00:00:00+00:00"
    (text,) = show_all(paths)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("software label-leakage-testbed 0.1.0 (shares 0-1, 3 of 0-3)")
    assert lines[at + 1] == "label-leakage-testbed 0.2.0 (share 2 of 0-3)"
    assert fact(text, "created") == "2026-01-02T03:04:05+00:00 to 2026-01-05T00:00:00+00:00"


def test_starts_and_losses_stand_behind_the_share(tmp_path):
    paths = shares(tmp_path, SPECS, 2)
    loss = {"time": "t", "rank": 1, "host": "node1", "reason": "killed", "start": 0}
    loss |= {"scenario": 0, "round": 3, "seconds": 0.5}
    with h5py.File(paths[1], "r") as file:
        told = dict(file.attrs)
    build(paths[1], SPECS[1::2], starts=[START, START], losses=[loss])
    with h5py.File(paths[1], "a") as file:
        file.attrs.update(told)
    (text,) = show_all(paths)
    assert " ".join(section(text, "shares")[1]).endswith("4711, started 2 times, lost 1 rank")


def test_other_files_stay_as_they_are(tmp_path):
    single = build(tmp_path / "single.h5", SPECS)
    lone = share(tmp_path, SPECS, "lone_1of2", (1, 2))
    halves = shares(tmp_path, SPECS, 2)
    with h5py.File(lone, "a") as file:
        file.attrs["experiment"] = "title: Another\n"
    texts = show_all([halves[0], single, lone, halves[1]])
    assert len(texts) == 3
    assert texts[1:] == [show(single), show(lone)]
    assert fact(texts[2], "share") == "1/2 of the scenarios of the experiment"
    assert "share  " not in texts[1]


def test_shares_in_several_folders_are_listed_in_full(tmp_path):
    paths = []
    for i in range(2):
        (tmp_path / f"node{i}").mkdir()
        paths.append(share(tmp_path / f"node{i}", SPECS, f"run_{i}of2", (i, 2)))
    (text,) = show_all(paths)
    assert fact(text, "files") == "see below"
    assert [line[1] for line in section(text, "shares")] == [*map(str, paths)]
