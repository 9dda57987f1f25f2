"""What tests share: the real data, and the rule that continuous integration skips nothing."""

import os
import signal
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are about a GPU where there is none; the summary says how many."""
    about_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not about_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in about_gpu]
        config.hook.pytest_deselected(items=about_gpu)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: only where PyTorch sees a GPU; left out elsewhere")
    # A shell ignores it in what it starts in the background, and programs under test inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
