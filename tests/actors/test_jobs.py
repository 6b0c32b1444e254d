"""Following a job: its status is the truth, the stream of its log may break off. Addresses that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from actors.jobs import ContactLost, Jobs, JobState, Status, follow

LOG = "one\ntwo\nthree\nfour\n"


class Told:
    """``Jobs`` as a test wants it: ``streams`` are one after the other, in pieces; an exception breaks
    one."""

    address = "http://head:8265"

    def __init__(self, streams: list[list[Any]], statuses: list[Any], log: Any = LOG) -> None:
        self.streams, self.statuses, self._log = streams, statuses, log
        self.asked = 0

    def tail(self, job: str) -> Iterator[str]:
        for piece in self.streams.pop(0) if self.streams else []:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def find(self, job: str) -> JobState | None:
        self.asked += 1
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return None if status is None else JobState(job, status, "true")

    def log(self, job: str) -> str:
        if isinstance(self._log, Exception):
            raise self._log
        return str(self._log)


def followed(told: Told, *, patience: float = 60.0, skip: int = 0) -> tuple[str, Status, list[float]]:
    written: list[str] = []
    naps: list[float] = []
    jobs: Any = told
    state = follow(
        jobs,
        "job",
        written.append,
        patience=patience,
        clock=lambda: sum(naps),
        sleep=naps.append,
        skip=skip,
    )
    return "".join(written), state.status, naps


def test_a_whole_stream_is_written_once() -> None:
    text, status, _ = followed(Told([["one\ntwo\n", "three\n", "four\n"]], ["SUCCEEDED"]))
    assert (text, status) == (LOG, "SUCCEEDED")


@pytest.mark.parametrize("cut", [1, 7, 13, len(LOG)])
def test_a_stream_that_broke_off_is_taken_up_where_it_was(cut: int) -> None:
    """The second stream begins anew, in other pieces."""
    told = Told([[LOG[:cut], ContactLost("cut")], [LOG[:5], LOG[5:]]], ["SUCCEEDED"])
    text, _, naps = followed(told)
    assert text == LOG and len(naps) == 1


def test_a_stream_that_ends_says_nothing_of_the_job() -> None:
    told = Told([[LOG[:8]], [LOG[:8]], [LOG]], ["RUNNING", "RUNNING", "FAILED"])
    text, status, _ = followed(told)
    assert (text, status) == (LOG, "FAILED")


def test_a_stream_that_hangs_does_not_hide_that_the_job_has_ended() -> None:
    told = Told([[LOG[:4], "", "", "", "never read"]], ["RUNNING", "RUNNING", "STOPPED"])
    text, status, _ = followed(told)
    assert (text, status) == (LOG, "STOPPED"), "what the stream did not bring is fetched"


def test_the_head_may_be_away_for_a_while() -> None:
    gone = ContactLost("gone")
    told = Told([[LOG[:4]], [gone], [gone], [LOG]], [gone, "SUCCEEDED"])
    text, status, naps = followed(told)
    assert (text, status) == (LOG, "SUCCEEDED") and naps == sorted(naps), "ever longer"


def test_patience_ends() -> None:
    told = Told([[ContactLost("gone")]] * 99, [ContactLost("gone")])
    with pytest.raises(ContactLost, match="gone"):
        followed(told, patience=20.0)


def test_a_log_that_cannot_be_had_any_more_does_not_hide_the_status() -> None:
    told = Told([[LOG[:4]]], ["FAILED"], log=ContactLost("its machine is gone"))
    assert followed(told)[:2] == (LOG[:4], "FAILED")


def test_what_is_known_already_is_skipped() -> None:
    assert followed(Told([[LOG]], ["STOPPED"]), skip=8)[0] == LOG[8:]


def test_a_job_that_the_cluster_forgot_is_a_mistake_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"the cluster at http://head:8265 knows no job job"):
        followed(Told([[]], [None]))


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://", "auto", ""])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="it has the form http://HEAD:8265"):
        Jobs(address)


def test_an_address_where_nobody_answers_is_refused() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"no Ray cluster answers at .* \(Connection refused\)"):
            Jobs(address)


def test_something_else_that_answers_is_told_from_a_dashboard() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match="is no Ray dashboard: "):
            Jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
