import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PATIENCE

SKIPPED = (
    "import pytest\ndef test_one():\n    pytest.skip('no such device')\ndef test_two(): pass\n"
)
SKIPPED_MODULE = "import pytest\npytest.skip('no such package', allow_module_level=True)\n"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail\ndef test_one(): assert False\n"
ULFM = "import pytest\n@pytest.mark.ulfm\ndef test_one(): pass\ndef test_two(): pass\n"
STARTS = """
import pytest
from launching import command
@pytest.mark.mpi
def test_one(): command("list", "attacks", ranks=2)
@pytest.mark.ranks
def test_two(): command("list", "attacks", ranks=2)
def test_three(): command("list", "attacks")
def test_four(): command("list", "attacks", ranks=2)
"""
DATA = "def test_data(data_root): assert data_root.is_dir()\n"


def run_pytest(
    folder: Path, content: str, ci: str | None, data: str | None = None
) -> tuple[int, str]:
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "test_it.py").write_text(content)
    (folder / "pytest.ini").write_text("[pytest]\n")
    hidden = {"CI", "TESTBED_TEST_DATA", "PYTEST_ADDOPTS"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(here), str(here.parent)])
    environment |= {} if ci is None else {"CI": ci}
    environment |= {} if data is None else {"TESTBED_TEST_DATA": data}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("ci", [None, ""])
def test_skip_passes_outside_ci(tmp_path: Path, ci: str | None) -> None:
    code, output = run_pytest(tmp_path, SKIPPED, ci)
    assert code == 0, output
    assert "1 passed, 1 skipped" in output


def test_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, SKIPPED, "true")
    assert code == 1, output
    assert "CI is set: a skipped test is a failure" in output
    assert "test_it.py::test_one: Skipped: no such device" in output
    assert "test_two:" not in output


def test_skipped_module_fails_in_ci(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, SKIPPED_MODULE + DATA, "true")
    assert code != 0, output
    assert "test_it.py: Skipped: no such package" in output


def test_expected_failure_passes_in_ci(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, EXPECTED_FAILURE, "true")
    assert code == 0, output


def test_data_root_skips_with_reason(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, DATA, None)
    assert code == 0, output
    assert "TESTBED_TEST_DATA is not set" in output


def test_data_root_fails_in_ci(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, DATA, "1")
    assert code == 1, output
    assert "1 error" in output
    assert "TESTBED_TEST_DATA is not set" in output


def test_data_root_fails_on_wrong_folder(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, DATA, None, str(tmp_path))
    assert code == 1, output
    assert "has no folder mnist and no cifar-100-python" in output


@pytest.mark.parametrize(("has", "said"), [(False, "1 passed, 1 deselected"), (True, "2 passed")])
def test_what_needs_ulfm_is_left_out_without_it(tmp_path: Path, has: bool, said: str) -> None:
    (tmp_path / "launching.py").write_text(f"def has_ulfm(): return {has}\n")
    code, output = run_pytest(tmp_path, ULFM, "true")
    assert code == 0, output
    assert said in output


def test_only_tests_that_are_marked_start_ranks(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, STARTS, "true")
    assert code == 1, output
    assert "1 failed, 3 passed" in output
    assert "_ test_four _" in output
    assert "AssertionError: tests that start ranks are marked" in output
