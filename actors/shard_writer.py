"""A worker's part of the durable checkpoints, written behind the training's back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from actors.line import Line
from runtime.checkpoint import write_shards
from runtime.plan import WorkerId
from runtime.protocol import Exponents, Finished, Unwritten, Written
from runtime.snapshots import ShardStore
from strategies.zero import ZeroRounds, piece_of


class ShardWriter:
    """Copies the owned shards and writes them to ``root``. One write at a time: where storage is slower than
    the checkpoints come, some are skipped.

    ``fault`` is called before every write.
    """

    def __init__(
        self, worker: WorkerId, root: str, line: Line, fault: Callable[[str, int, int], None]
    ) -> None:
        self._worker, self._root, self._line, self._fault = worker, root, line, fault
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def write(
        self, rounds: ZeroRounds, store: ShardStore, version: int, exponents: Exponents, *, is_last: bool
    ) -> None:
        if self._writing is not None and not self._writing.done() and not is_last:
            problem = f"worker {self._worker} was still writing the one before that of step {version}"
            self._line.tell(Unwritten(self._worker, version, problem))
            return
        pieces = {}
        for shard in rounds.owned:
            state_3N = store.get(piece_of(shard), version)
            assert state_3N is not None, f"{shard} is owned but not held in version {version}"
            pieces[piece_of(shard)] = state_3N.clone()
        generation = rounds.plan.generation

        def write() -> None:
            try:
                self._fault("checkpoint", version, 0)
                file = write_shards(self._root, version, self._worker, generation, pieces)
            except Exception as error:
                problem = f"worker {self._worker} could not write: {error}"
                # the run's end waits for the last one, whoever is its controller by then
                tell = self._line.tell_surely if is_last else self._line.tell
                tell(Unwritten(self._worker, version, problem))
                return
            written = Written(self._worker, generation, version, exponents, file)
            self._line.tell_surely(written, only=True)  # older ones are of no use any more

        self._writing = self._thread.submit(write)

    def finish(self, generation: int, version: int) -> None:
        """Tells that this worker has stopped at ``version``, once everything is written."""
        self._thread.submit(self._line.tell_surely, Finished(self._worker, generation, version))

    def close(self) -> None:
        """Waits for the write under way."""
        self._thread.shutdown()
