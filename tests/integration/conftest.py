"""Fixtures of several integration tests."""

import pytest

from tests.integration.executors import WAYS, use_triton


@pytest.fixture(params=["torch", *WAYS])
def executor(request, monkeypatch):
    """What runs on two tiers, runs through each executor."""
    if request.param != "torch":
        use_triton(monkeypatch, request.param)
    return request.param
