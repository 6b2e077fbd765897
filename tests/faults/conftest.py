"""A small model for clusters, and clusters that tests of one module share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import NAME, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint whose folder name is the model's name."""
    return write_tiny_model(tmp_path_factory.mktemp("fault-models") / NAME)
