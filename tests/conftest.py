"""The order of the files under pytest-xdist's `--no-loadscope-reorder`, as `make test` runs them."""

import pytest

# Long ones that mostly wait: last, they would keep one worker alone; and two Ray clusters at once are too much for it.
FIRST = ("test_soak.py", "test_batch_cluster.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
