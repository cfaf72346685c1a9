"""One corpus for all tests that train on it: runs of one shape on the same data share their compiled programs."""

import pytest

from tests.training.lab import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(DataConfig, cache folder)"""
    return make_corpus(tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache"))
