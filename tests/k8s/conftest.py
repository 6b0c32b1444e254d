"""Which API server the tests here speak to."""

from __future__ import annotations

from functools import partial

import pytest

from tests.support.kubernetes.apiserver import real_server
from tests.support.kubernetes.lab import ApiServer
from tests.support.kubernetes.server import stand_in


@pytest.fixture
def api_server(request: pytest.FixtureRequest) -> ApiServer:
    """The stand-in; with ``--apiserver`` a real one."""
    binaries = request.config.getoption("--apiserver")
    return stand_in if binaries is None else partial(real_server, binaries.resolve())
