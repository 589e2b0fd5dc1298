"""Everything here starts in a second, as nothing of it imports torch: `make light`."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if items and all(HERE in item.path.parents for item in items) and "torch" in sys.modules:
        raise pytest.UsageError("a file in tests/light imports torch: it belongs beside its room in tests/")


@pytest.fixture(autouse=True)
def no_torch(request):
    """Where these tests run by themselves: elsewhere others have imported it before."""
    is_light = "torch" not in sys.modules and request.node.get_closest_marker("slow") is None
    yield
    assert not is_light or "torch" not in sys.modules, "this test imports torch: mark it slow, or move it"
