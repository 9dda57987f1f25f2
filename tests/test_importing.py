"""How PyTorch is imported."""

import gc
import sys

import pytest
from launching import finish

from testbed.importing import import_torch


def test_what_pytorch_makes_is_kept_from_the_garbage_collector():
    code = (
        "import gc, sys\n"
        "from testbed.importing import import_torch\n"
        "assert 'torch' not in sys.modules\n"
        "import_torch()\n"
        "assert 'torch' in sys.modules and gc.isenabled()\n"
        "print(gc.get_freeze_count(), len(gc.get_objects()))\n"
    )
    done = finish([sys.executable, "-c", code])
    assert done.status == 0, done.err
    frozen, known = map(int, done.out.split())
    assert frozen > 100_000
    assert known < 10_000


def test_what_came_after_it_is_not():
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    import_torch()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "absent",
    [
        "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]",
        "sys.modules['torch'] = None",
    ],
)
def test_the_collector_is_as_before_when_pytorch_is_not_there(absent, enabled):
    code = (
        "import gc, sys\n"
        "from testbed.importing import import_torch\n"
        f"{absent}\n"
        f"gc.{'enable' if enabled else 'disable'}()\n"
        "try: import_torch()\n"
        "except ImportError: print(gc.isenabled())\n"
    )
    done = finish([sys.executable, "-c", code])
    assert done.out == f"{enabled}\n", done.err
