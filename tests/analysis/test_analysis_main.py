import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from build_file import Spec, build
from sharing import share

from analysis.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return build(tmp_path / "run.h5", [Spec(rounds=5)])


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_show(path, tmp_path, capsys):
    other = build(tmp_path / "other.h5", [Spec(rounds=5)])
    assert main(["show", str(path), str(other), str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("complete (5 of 5 rounds, 100 %)") == 2
    assert err == ""


def test_table(path, capsys):
    assert main(["table", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "uniform guess" in out
    assert err == ""


def test_table_of_some_attacks_with_a_row_each(path, capsys):
    assert main(["table", str(path), "--attacks", "llg_plus, llg", "--rows", "attacks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["LLG", "LLG+"]
    assert "Random" not in "".join(lines)


def test_table_per_seed(tmp_path, capsys):
    path = build(tmp_path / "run.h5", [Spec({"seed": seed}, rounds=2) for seed in (1, 2)])
    for arguments, rows in [(["--format", "csv"], 4), (["--format", "csv", "--per-seed"], 8)]:
        assert main(["table", str(path), *arguments]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + rows


def test_figures_of_some_attacks(path, tmp_path, capsys):
    assert main(["figures", str(path), "-o", str(tmp_path), "--attacks", "llg"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_table_into_a_file(path, tmp_path, capsys):
    output = tmp_path / "table.csv"
    assert (
        main(["table", str(path), "--format", "csv", "--metric", "jaccard", "-o", str(output)]) == 0
    )
    assert capsys.readouterr().out == ""
    table = pd.read_csv(output)
    assert table["metric"].unique().tolist() == ["jaccard"]
    assert len(table) == 4


def test_tradeoff_as_a_table_and_as_a_figure(tmp_path, capsys):
    path = build(tmp_path / "run.h5.partial", [Spec(rounds=5, accuracy=0.5)], committed=[3])
    assert main(["tradeoff", str(path), "--attack", "llg", "--last", "2"]) == 0
    out, err = capsys.readouterr()
    assert "last 2 evaluated rounds" in out
    assert "3 of 5 rounds" in err
    csv = tmp_path / "t.csv"
    assert main(["tradeoff", str(path), "--format", "csv", "-o", str(csv)]) == 0
    assert pd.read_csv(csv)["accuracy"].tolist() == [0.5]
    capsys.readouterr()
    assert main(["tradeoff", str(path), "-o", str(tmp_path / "t.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 't.svg'}\n"
    assert (tmp_path / "t.svg").stat().st_size > 5000


def test_figures(path, tmp_path, capsys):
    assert main(["figures", str(path), "-o", str(tmp_path / "out"), "--format", "svg"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert (tmp_path / "out" / line.rpartition("/")[2]).stat().st_size > 1000


def test_an_incomplete_file_is_pointed_out_beside_the_table(tmp_path, capsys):
    build(tmp_path / "run.h5.partial", [Spec(rounds=5)], committed=[2])
    assert main(["table", str(tmp_path / "run.h5"), "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert err.startswith("note: ")
    assert "2 of 5 rounds" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["show", "missing.h5"], "no such file"),
        (["table", "missing.h5"], "no such file"),
        (["figures", "missing.h5", "-o", "out"], "no such file"),
        (["table", "{path}", "--metric", "accuracy"], "unknown metric"),
        (["table", "{path}", "--attacks", "llgg"], "did you mean 'llg'"),
        (["figures", "{path}", "-o", "out", "--attacks", "llgg"], "did you mean 'llg'"),
        (["table", "{path}", "-o", "no/such/folder/x"], "cannot write the table"),
        (["figures", "{path}", "-o", "{path}"], "cannot write the figure"),
        (["table", "{empty}"], "no round with an attack"),
        (["tradeoff", "missing.h5"], "no such file"),
        (["tradeoff", "{path}", "--attack", "llgg"], "did you mean 'llg'"),
        (["tradeoff", "{path}", "--last", "0"], "expected at least 1"),
        (["tradeoff", "{path}", "-o", "x.png"], "no model was evaluated"),
        (["tradeoff", "{path}", "-o", "no/such/folder/x"], "cannot write the table"),
        (["figures", "{empty}", "-o", "out"], "no round with an attack"),
        (["show", "{text}"], "no HDF5 file"),
    ],
)
def test_mistakes_get_one_line_and_status_2(path, tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("title: an experiment")
    names = {
        "path": path,
        "empty": build(tmp_path / "new.h5.partial", [Spec()], committed=[0]),
        "text": tmp_path / "x.yaml",
    }
    assert main([argument.format(**names) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize(
    "arguments", [[], ["table"], ["figures", "x.h5"], ["table", "--format", "x"]]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: analysis" in capsys.readouterr().err


def test_help_names_every_command_and_loads_nothing_heavy():
    done = run("-m", "analysis", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("show", "table", "compare", "tradeoff", "figures", "replay", "attack"):
        assert command in done.stdout
    heavy = "{'pandas', 'matplotlib', 'h5py'} & set(sys.modules)"
    done = run("-c", f"import sys, analysis.__main__; sys.exit(' '.join({heavy}) or 0)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error(tmp_path):
    specs = [Spec({"a.b": "x" * 20_000 + str(i)}, rounds=1, clients=1) for i in range(10)]
    path = build(tmp_path / "run.h5", specs)
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis", "show", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "A title\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def test_a_folder_and_a_pattern_in_quotes_are_the_shares_in_it(tmp_path, capsys):
    specs = [Spec({"federation.batch_size": size}, rounds=2) for size in (1, 2, 4)]
    share(tmp_path, specs, "run_0of3", (0, 3))
    share(tmp_path, specs, "run_1of3", (1, 3), committed=[1])
    for name in (str(tmp_path), str(tmp_path / "run_*of3.h5")):
        assert main(["table", name]) == 0
        out, err = capsys.readouterr()
        assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["0", "1"], ["1", "2"]]
        assert "share 2 of 0-2 is not among the files, with 1 of the 3 scenarios\n" in out
        assert err == ""
        assert main(["show", name]) == 0
        assert "shares    2 of 3\n" in capsys.readouterr().out
    # Where there are no notes on the screen.
    assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "note: share 2 of 0-2 is not among the files, with 1 of the 3 scenarios",
        "note: share 1 of 0-2 is incomplete, with 1 of 2 rounds",
    ]
    for command in ("show", "table", "tradeoff"):
        assert main([command, str(tmp_path / "nothing*")]) == 2
        assert "no file matches this pattern" in capsys.readouterr().err
