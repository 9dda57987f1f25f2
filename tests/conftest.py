"""What tests share: the real data, and the rule that continuous integration skips nothing."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On a shared machine the time of one example says nothing.
settings.register_profile(
    "testbed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("testbed")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real data: mnist/ and cifar-100-python/."""
    given = os.environ.get("TESTBED_TEST_DATA")
    if not given:
        reason = "TESTBED_TEST_DATA is not set: name a folder with mnist/ and cifar-100-python/"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    root = Path(given)
    missing = [name for name in ("mnist", "cifar-100-python") if not (root / name).is_dir()]
    if missing:
        pytest.fail(f"TESTBED_TEST_DATA={given} has no folder {' and no '.join(missing)}")
    return root


def _sees_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _has_ulfm() -> bool:
    from launching import has_ulfm

    return has_ulfm()


_NEEDS = {
    "gpu": ("only where PyTorch sees a GPU; left out elsewhere", _sees_gpu),
    "ulfm": ("only where mpirun is an Open MPI with ULFM; left out elsewhere", _has_ulfm),
}
_RANKS = {
    "mpi": "starts ranks, and is run under every MPI",
    "ranks": "starts ranks; what it shows does not depend on the MPI",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of what this machine has not; the summary says how many."""
    for name, (_, has) in _NEEDS.items():
        needy = [item for item in items if item.get_closest_marker(name)]
        if needy and not has():
            items[:] = [item for item in items if item not in needy]
            config.hook.pytest_deselected(items=needy)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let only tests start ranks that are marked so: the pass under MPICH selects by it."""
    launching = sys.modules.get("launching")
    if launching is not None:
        launching.may_start_ranks = any(mark.name in _RANKS for mark in item.iter_markers())


def pytest_configure(config: pytest.Config) -> None:
    for name, (what, _) in _NEEDS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    for name, what in _RANKS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    # A shell ignores it in what it starts in the background, and programs under test inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # So does nohup; what this process handles, though by doing nothing, its children get as usual.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if os.environ.get("CI"):
        config.pluginmanager.register(_SkipsFail(), "skips-fail")


class _SkipsFail:
    """Makes a session with a skipped test or module fail, and says which and why."""

    def __init__(self) -> None:
        self._skipped: list[str] = []

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped too.
        if report.skipped and not hasattr(report, "wasxfail"):
            detail = report.longrepr
            reason = detail[2] if isinstance(detail, tuple) else str(detail)
            self._skipped.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report)

    # Outermost, so that the summary, which is printed in an inner wrapper, has nothing to correct.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self._skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._skipped:
            terminalreporter.section("CI is set: a skipped test is a failure", red=True)
            for line in self._skipped:
                terminalreporter.line(line)
