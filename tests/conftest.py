"""What every test shares: one thread, no network, no display, the same examples on every run."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: many small tests side by side are fastest with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one corpus for all, so that recipes are equal and the cache is used; and short samples."""
    place = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFORMER_CACHE", str(place / "cache"))
        patch.setattr(importlib.import_module("tokenformer.evaluate"), "SAMPLE_BYTES", 4)
        yield place


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws random tensors draws the same ones whichever tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.name != "test_the_commands_run_one_after_the_other")
