"""Clusters of real processes for the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.tiny_model import NAME, write_tiny_model

API_KEY = "key-of-the-tests"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint whose folder name is the model's name."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill, one decode, one gateway with a key; shared by tests that leave it as it was."""
    with Cluster(tmp_path_factory.mktemp("cluster"), str(tiny_model), api_key=API_KEY) as cluster:
        yield cluster
