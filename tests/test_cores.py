"""Test processes keep out of each other's cores."""

from __future__ import annotations

import secrets
import subprocess
import sys

from tests.support.cores import Claim


def test_a_core_has_one_owner_until_it_is_given_back() -> None:
    prefix = secrets.token_hex(8)
    first, second, third = (Claim([4, 7], prefix) for _ in range(3))
    assert (first.take(), second.take(), third.take()) == (4, 7, None)
    assert first.take() == 4, "who has one keeps it"
    first.give_back()
    first.give_back()
    assert (third.take(), first.take()) == (4, None)
    second.give_back()
    assert first.take() == 7
    third.give_back()
    first.give_back()


def test_who_dies_leaves_its_core() -> None:
    prefix = secrets.token_hex(8)
    script = f"""
from tests.support.cores import Claim
claim = Claim([0], {prefix!r})
print(claim.take(), flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "0\n"
        mine = Claim([0], prefix)
        assert mine.take() is None
        other.kill()
        other.wait()
    assert mine.take() == 0
    mine.give_back()
