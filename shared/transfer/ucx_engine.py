"""A thread that owns UCX. With `ucx_operation` the only module that touches ucxx, whose low-level API is unstable.

An engine owns a UCX context, its worker and the worker's endpoints. It sleeps in epoll on two descriptors: UCX's
own, and an eventfd that the event loop rings when it has queued a command. UCX copies with the GIL released.

    event loop                               engine thread
    endpoint.send(...)  -- command queue -->  post requests
    future  <-- call_soon_threadsafe -------  requests completed or failed

Endpoints are made through a listener, not from worker addresses: so a peer's death is seen within milliseconds on every
transport.
"""

from __future__ import annotations

import asyncio
import collections
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from shared.transfer.listen_filter import ListenFilter, listening_sockets
from shared.transfer.transport import TransportError
from shared.transfer.ucx_operation import Link, Operation, UCXError, libucxx

log = structlog.get_logger(__name__)

_FEATURES = (libucxx.Feature.TAG, libucxx.Feature.STREAM, libucxx.Feature.WAKEUP)
_POLL_S = 1.0
_CLOSE_PERIOD_NS = 10**9
_FAREWELL_TURNS = 20
_SLICE_S = 0.0005
_LARGE_PIECE_S = 0.00005  # half of what 512 KiB take between processes, twice a segment of TCP
_POSTED_AT_ONCE = 16  # requests of one operation; each takes some 10 us, and the first ones could be answered meanwhile
_SMALL_PIECES = 8  # after so many in a row more small ones are expected
_QUIESCE_S = 5.0  # a closed endpoint's requests complete within milliseconds


class NotQuiescentError(RuntimeError):
    """UCX did not let go of memory after its endpoint was closed; only the end of the process frees it."""


class UcxEngine(threading.Thread):
    """A thread that owns a UCX context.

    Args:
        port: To listen at; 0 = any, None = peers don't connect to this one.

    Attributes:
        ready: Done once UCX is up; its result is the port, 0 without a listener.
        finished: Done once every endpoint is closed and UCX is shut down.
    """

    def __init__(
        self,
        options: dict[str, str],
        port: int | None,
        on_link: Callable[[Link], None],
        on_failure: Callable[[BaseException], None],
        listen_filter: ListenFilter,
    ) -> None:
        super().__init__(name="ucx-engine", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._options = options
        self._context: Any = None
        self._worker: Any = None
        self._listener: Any = None
        self._requested_port = port
        self._on_link = on_link
        self._on_failure = on_failure
        self._listen_filter = listen_filter
        self._commands: collections.deque[tuple[Callable[[], None], asyncio.Future[Any]]] = collections.deque()
        self._active: list[Operation] = []
        self._partly_posted: collections.deque[Operation] = collections.deque()  # of those
        self._links: set[Link] = set()
        self._outbox: list[Callable[[], None]] = []
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bell_lock = threading.Lock()  # the descriptor must not be rung once it is closed and its number reused
        self._will_ring = False
        self._stopping = False
        self.ready: asyncio.Future[int] = self.new_future()
        self.finished: asyncio.Future[None] = self.new_future()

    # -- called from the event loop

    def new_future(self) -> asyncio.Future[Any]:
        """A future whose failure nobody is obliged to look at: closing the endpoint is what matters then."""
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(_mark_retrieved)
        return future

    def command(self, run: Callable[[], None], future: asyncio.Future[Any]) -> None:
        """Has `run` executed by the engine thread; if it raises, `future` fails."""
        with self._bell_lock:
            if not self._stopping:
                self._commands.append((run, future))
                if not self._will_ring:
                    # Once for all commands of this turn of the loop: ringing lets the engine take the GIL from it.
                    self._will_ring = True
                    self._loop.call_soon(self._ring)
                return
        future.set_exception(TransportError("the data plane is stopped"))

    def _ring(self) -> None:
        self._will_ring = False
        with self._bell_lock:
            if not self._stopping and self._commands:
                os.eventfd_write(self._bell, 1)

    def request_stop(self) -> None:
        """Asks the thread to close everything and end: see `finished`."""
        with self._bell_lock:
            if not self._stopping:
                self._stopping = True
                os.eventfd_write(self._bell, 1)

    # -- the engine thread

    def run(self) -> None:
        """Opens UCX, turns until stopped, closes everything."""
        failure: BaseException | None = None
        try:
            self._open()
            self._turn()
        except BaseException as exc:
            failure = exc
        try:
            self._shut_down()
        except BaseException as exc:
            failure = failure or exc
        if failure is None:
            self.resolve(self.finished, None)
        else:
            error = failure  # bound once: the name of an except clause does not outlive it
            self._reject(self.ready, error)
            self._reject(self.finished, error)
            self._outbox.append(lambda: self._on_failure(error))
        self._flush()

    def connect(self, host: str, port: int, future: asyncio.Future[Link]) -> None:
        """Makes an endpoint; the connection itself comes up on its own."""
        self.resolve(future, self._adopt(libucxx.UCXEndpoint.create(self._worker, host, port, True)))

    def post(self, operation: Operation, amid: Operation | None = None) -> None:
        """Posts the first of an operation's requests, and after those `amid`, on the same link; the rest follows."""
        endpoint = _usable(operation.link)
        for one in (operation,) if amid is None else (operation, amid):
            self._active.append(one)
            one.post_more(endpoint, _POSTED_AT_ONCE)
        if not operation.is_posted:
            self._partly_posted.append(operation)

    def close(self, link: Link) -> None:
        """Closes a link. On return none of its requests is under way."""
        link.is_open = False
        endpoint, link.endpoint = link.endpoint, None
        if endpoint is None:
            return
        endpoint.close_blocking(_CLOSE_PERIOD_NS, 1)
        mine = [operation for operation in self._active if operation.link is link]
        self._active = [operation for operation in self._active if operation.link is not link]
        self._await_quiescence([request for operation in (*mine, *link.unfinished) for request in operation.requests])
        for operation in mine:
            self._reject(operation.future, TransportError("endpoint closed"))
        link.unfinished.clear()
        self._links.discard(link)

    def resolve(self, future: asyncio.Future[Any], result: object) -> None:
        """Settles `future` on the event loop at the end of this turn."""
        self._outbox.append(lambda: None if future.done() else future.set_result(result))

    def _reject(self, future: asyncio.Future[Any], error: BaseException) -> None:
        if not isinstance(error, TransportError):
            cause, error = error, TransportError(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        failure = error
        self._outbox.append(lambda: None if future.done() else future.set_exception(failure))

    def _await_quiescence(self, requests: list[Any]) -> None:
        deadline_s = time.monotonic() + _QUIESCE_S
        while not all(request.completed for request in requests):
            self._worker.progress()
            if time.monotonic() > deadline_s:
                raise NotQuiescentError(f"requests of a closed endpoint are still under way after {_QUIESCE_S} s")

    def _open(self) -> None:
        before = listening_sockets().keys()
        self._context = libucxx.UCXContext(self._options, _FEATURES)
        self._worker = libucxx.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        if self._requested_port is not None:
            self._listener = libucxx.UCXListener.create(
                self._worker, self._requested_port, self._accept, deliver_endpoint=True
            )
        self._listen_filter.attach(listening_sockets().keys() - before)  # UCX's worker has sockets of its own
        self.resolve(self.ready, 0 if self._listener is None else int(self._listener.port))
        self._flush()

    def _turn(self) -> None:
        worker, poll = self._worker, select.epoll()
        poll.register(worker.epoll_file_descriptor, select.EPOLLIN)
        poll.register(self._bell, select.EPOLLIN)
        try:
            while not self._stopping:
                has_more = self._progress()
                self._sweep()
                if self._run_commands():
                    has_more = self._progress()
                    self._sweep()
                has_more |= self._post_more()
                self._flush()
                if has_more or self._commands or not worker.arm():
                    continue
                for descriptor, _ in poll.poll(_POLL_S):
                    if descriptor == self._bell:
                        os.eventfd_read(self._bell)
        finally:
            poll.close()

    def _progress(self) -> bool:
        """Lets UCX work; returns whether it has more to do.

        Where it copies large pieces, as over shared memory, that is for a slice of time: commands don't wait for the
        rest, and each block is noted as soon as it is there, for whoever checks it to find it in the cache still. Small
        pieces, as over TCP, are taken until there are none: to come back here after each costs a tenth of the
        throughput.
        """
        before_s = time.monotonic()
        end_s, small_pieces = before_s + _SLICE_S, 0
        while small_pieces < _SMALL_PIECES and self._worker.progress_once():
            now_s = time.monotonic()
            if now_s - before_s > _LARGE_PIECE_S:
                self._sweep(arriving_only=True)
                small_pieces = 0
                now_s = time.monotonic()
            else:
                small_pieces += 1
            if now_s > end_s:
                return True
            before_s = now_s
        self._worker.progress()  # always once before sleeping: only here ucxx cancels what it was asked to
        return False

    def _run_commands(self) -> bool:
        ran = False
        while self._commands:
            run, future = self._commands.popleft()
            ran = True
            try:
                run()
            except (UCXError, TransportError) as exc:
                self._reject(future, exc)
            except BaseException as exc:  # a defect, or memory that UCX does not let go: this thread ends
                self._reject(future, exc)
                raise
        return ran

    def _post_more(self) -> bool:
        """Posts the next few requests of an operation that has more; returns whether there was one."""
        if not self._partly_posted:
            return False
        operation = self._partly_posted.popleft()
        if operation not in self._active:  # it failed, or its link was closed
            return True
        try:
            operation.post_more(_usable(operation.link), _POSTED_AT_ONCE)
        except (UCXError, TransportError) as exc:
            self._active.remove(operation)
            operation.link.unfinished.append(operation)
            self._reject(operation.future, exc)
        else:
            if not operation.is_posted:
                self._partly_posted.append(operation)
        return True

    def _sweep(self, *, arriving_only: bool = False) -> None:
        """Settles what has completed.

        Args:
            arriving_only: Looks only at blocks whose arrival somebody waits for.
        """
        self._active = [
            operation
            for operation in self._active
            if (arriving_only and operation.on_arrival is None) or not self._settle(operation)
        ]

    def _settle(self, operation: Operation) -> bool:
        """Takes note of an operation's finished requests; returns whether it is over."""
        error = operation.take_completed()
        if error is not None:
            operation.link.unfinished.append(operation)
            self._reject(operation.future, error)
        elif operation.requests or not operation.is_posted:
            return False
        elif (follow := operation.then) is not None:
            self._commands.append((lambda: self.post(follow()), operation.future))
        elif not operation.is_aside:
            self.resolve(operation.future, operation.result() if operation.result else None)
        return True

    def _accept(self, endpoint: Any) -> None:
        link = self._adopt(endpoint)
        self._outbox.append(lambda: self._on_link(link))

    def _adopt(self, endpoint: Any) -> Link:
        link = Link(endpoint)
        endpoint.set_close_callback(link.lost)
        self._links.add(link)
        return link

    def _shut_down(self) -> None:
        with self._bell_lock:
            self._stopping = True
            os.close(self._bell)
        for _, future in self._commands:
            self._reject(future, TransportError("the data plane is stopped"))
        self._commands.clear()
        for link in list(self._links):
            self.close(link)
        # A forced close lets go of its sockets in later turns; without them peers would not hear of it.
        for _ in range(_FAREWELL_TURNS if self._worker is not None else 0):
            self._worker.progress()
        self._listener = self._worker = self._context = None

    def _flush(self) -> None:
        """Hands everything that became known in this turn to the event loop in one go."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []
        try:
            self._loop.call_soon_threadsafe(_run_all, outbox)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("event_loop_gone", callbacks=len(outbox))


def _usable(link: Link) -> Any:
    """The endpoint of a link, to post on.

    Raises:
        UCXError, TransportError: It is closed, failed, or lost its peer.
    """
    endpoint = link.endpoint
    if endpoint is None:
        raise TransportError("endpoint is closed")
    # UCX spins for ever on a post to an endpoint whose connection attempt already failed.
    endpoint.raise_on_error()
    if not endpoint.alive:
        raise TransportError("endpoint lost its peer")
    return endpoint


def _mark_retrieved(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _run_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
