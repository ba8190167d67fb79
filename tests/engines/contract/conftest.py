"""The folders of tiny models."""

from __future__ import annotations

import pytest

from tests.engines.contract.tiny import Folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("contract"))
