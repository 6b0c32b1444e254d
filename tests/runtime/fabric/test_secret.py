"""Where a run's secret comes from."""

from __future__ import annotations

import pytest

from runtime.fabric.secret import secret_of, secret_to_hand_out
from runtime.settings import FABRIC_SECRET


def test_without_a_clusters_secret_every_run_gets_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FABRIC_SECRET, raising=False)
    one, other = secret_to_hand_out(), secret_to_hand_out()
    assert one is not None and other is not None and one != other
    assert secret_of("a", one) == one


def test_a_clusters_secret_is_not_handed_out_and_serves_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FABRIC_SECRET, "0123456789abcdef")
    assert secret_to_hand_out() is None
    a, b = secret_of("a", None), secret_of("b", None)
    assert a == secret_of("a", None) and a != b and len(a) == 32
    assert b"0123456789abcdef" not in a
    monkeypatch.setenv(FABRIC_SECRET, "another 01234567")
    assert secret_of("a", None) != a


def test_a_node_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FABRIC_SECRET, raising=False)
    with pytest.raises(ValueError, match="not on this node: set it to the same value on every node"):
        secret_of("a", None)


def test_a_short_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FABRIC_SECRET, "too short")
    for ask in (secret_to_hand_out, lambda: secret_of("a", None)):
        with pytest.raises(ValueError, match=r"\$REKNIT_FABRIC_SECRET has 9 bytes: use at least 16"):
            ask()
