"""Requests and replies that survive broken channels. The source calls, the destination serves.

```
 caller                                  server
   | Attach(session_id, is_new)  ------->  |     after each dial
   | <------------------------- Attached   |     (or Refusal with seq 0)
   | Call(seq, body)             ------->  |     runs the handler, once for each seq
   | <---------------------- Working(seq)  |     again and again while it runs
   | <---------------- Reply(seq, body)    |     (or Refusal(seq, code, text))
```

A channel on which nothing comes for `dead_peer_s` is as good as broken: the network swallows what is sent, or the
server's host has stopped. The caller dials again, for as long as an outage may last.

Law: **every seq is executed at most once.** The caller repeats a call with its old seq on a new channel; the
server answers a seq that it has executed with the stored reply, and one that is running when it is done. A seq
below the newest is a ghost of a dead channel and is dropped. A caller that was attached before and meets a
server that does not know the session is told so, and executes nothing: the server was restarted.

Tasks: each running handler is a task of the CallServer's task group, so it goes on when the channel breaks;
leaving `async with CallServer(...)` cancels them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import anyio
import anyio.abc

from transport import limits
from transport.credit import Backoff
from transport.errors import (
    BadMessage,
    LocalMisuse,
    PeerGone,
    PeerRefused,
    SessionForgotten,
    TransportError,
)
from transport.schema import Schema
from transport.wire import MessageChannel

__all__ = [
    "ENVELOPE_TYPES",
    "SESSION_ID_BYTES",
    "SESSION_SCHEMA",
    "Attach",
    "Attached",
    "Call",
    "CallServer",
    "CallSession",
    "Handler",
    "Refusal",
    "Reply",
    "Working",
]

SESSION_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """First message of the caller on each channel. `is_new` until a server has answered once."""

    session_id: bytes
    is_new: bool

    def __post_init__(self) -> None:
        if len(self.session_id) != SESSION_ID_BYTES:
            raise ValueError(f"a session id has {SESSION_ID_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The server knows the session; calls may follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, encoded with the caller's schema. Its first `seq` is 1, each new one is higher."""

    seq: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """Call `seq` is being worked on; only a sign of life."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The reply to call `seq`."""

    seq: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Call `seq` was refused; 0 means that the attachment was."""

    seq: int
    code: str
    text: str


ENVELOPE_TYPES: Final = (Attach, Attached, Call, Working, Reply, Refusal)
# What a channel speaks that carries a session and nothing else.
SESSION_SCHEMA: Final = Schema(*ENVELOPE_TYPES)

UNKNOWN_SESSION: Final = "unknown-session"
TOO_MANY_SESSIONS: Final = "too-many-sessions"
INTERNAL_ERROR: Final = "internal-error"

Handler = Callable[[object], Awaitable[object]]


class CallSession:
    """The calling side. One call at a time.

    `dial` gives a channel that speaks at least ENVELOPE_TYPES (SESSION_SCHEMA); `schema` is that of the
    requests and replies inside. `outage_s` bounds how long a call goes on dialling after the link was last
    seen well, `dead_peer_s` how long a channel may be silent while a call is waited for.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[MessageChannel]],
        schema: Schema,
        session_id: bytes,
        *,
        outage_s: float,
        backoff: Backoff,
        dead_peer_s: float = 10.0,
    ) -> None:
        self._dead_peer_s = dead_peer_s
        self._dial = dial
        self._schema = schema
        self._session_id = session_id
        self._outage_s = outage_s
        self._backoff = backoff
        self._channel: MessageChannel | None = None
        self._was_attached = False
        self._is_calling = False
        self._seq = 0
        self._breaks = 0

    @property
    def link_breaks(self) -> int:
        """How often an attached channel broke."""
        return self._breaks

    async def call(self, request: object, *, timeout_s: float) -> object:
        """Have the peer execute `request` at most once, and give its reply.

        A call that is cancelled may still be executed; the next call has a new seq.

        Raises:
            PeerRefused: the handler there said no.
            PeerGone: no reply within `timeout_s`, or the link was broken for `outage_s`, or (SessionForgotten) the
                peer was restarted. `may_have_reached_peer` tells whether it may have been executed.
            PeerMisbehaved, UntrustedPeer, VersionMismatch: nothing of the request has left; otherwise these
                become PeerGone, with the cause chained.
            LocalMisuse: `request` is not of the schema, or another call is running.
        """
        if self._is_calling:
            raise LocalMisuse("a session makes one call at a time")
        body = self._schema.encode(request)
        self._is_calling = True
        self._seq += 1
        attempt = _Attempt(call=Call(seq=self._seq, body=body))
        try:
            with anyio.fail_after(timeout_s):
                return await self._call_until_answered(attempt)
        except TimeoutError as exc:
            await self._drop_channel()
            raise PeerGone(
                f"no reply within {timeout_s:g} s", may_have_reached_peer=attempt.may_have_reached_peer
            ) from exc
        finally:
            self._is_calling = False

    async def _call_until_answered(self, attempt: _Attempt) -> object:
        well_at_s = anyio.current_time()
        while True:
            try:
                channel = await self._attached_channel()
                well_at_s = anyio.current_time()
                attempt.may_have_reached_peer = True
                answer = await self._exchange(channel, attempt.call)
            except SessionForgotten as exc:
                await self._drop_channel()
                raise SessionForgotten(str(exc), may_have_reached_peer=attempt.may_have_reached_peer) from exc
            except PeerGone as exc:
                was_attached = self._channel is not None
                await self._drop_channel()
                if was_attached:
                    self._breaks += 1
                    # The link was well until now: the channel had been answered on or was waiting.
                    well_at_s = anyio.current_time()
                await self._pause_or_give_up(well_at_s, exc, attempt)
                continue
            except (TransportError, OSError) as exc:
                await self._drop_channel()
                if isinstance(exc, OSError):
                    await self._pause_or_give_up(well_at_s, exc, attempt)
                    continue
                if not attempt.may_have_reached_peer:
                    raise
                raise PeerGone(str(exc), may_have_reached_peer=True) from exc
            if isinstance(answer, Refusal):
                raise PeerRefused(answer.code, answer.text)
            return answer

    async def _attached_channel(self) -> MessageChannel:
        if self._channel is not None:
            return self._channel
        channel = await self._dial()
        is_attached = False
        try:
            with self._unless_silent():
                await channel.send(Attach(session_id=self._session_id, is_new=not self._was_attached))
                attached = await channel.receive()
            match attached:
                case Attached():
                    is_attached = True
                case Refusal(code=code, text=text) if code == UNKNOWN_SESSION:
                    raise SessionForgotten(text)
                case Refusal(code=code, text=text):
                    raise PeerRefused(code, text)
                case other:
                    raise BadMessage(f"{type(other).__name__} where Attached was due")
        finally:
            if not is_attached:
                await channel.aclose()
        self._was_attached = True
        self._channel = channel
        self._backoff.reset()
        return channel

    async def _exchange(self, channel: MessageChannel, call: Call) -> object:
        seq = call.seq
        with self._unless_silent():
            await channel.send(call)
        while True:
            with self._unless_silent():
                message = await channel.receive()
            match message:
                case Reply(seq=got, body=body) if got == seq:
                    return self._schema.decode(body)
                case Refusal(seq=got) as refusal if got == seq:
                    return refusal
                case Working(seq=got) if 0 < got <= seq:
                    continue
                case Reply(seq=got) | Refusal(seq=got) if 0 < got < seq:
                    continue  # of a call that was cancelled here
                case other:
                    raise BadMessage(f"{type(other).__name__} where the reply to call {seq} was due")

    @contextmanager
    def _unless_silent(self) -> Iterator[None]:
        """Make a channel on which nothing moves for too long one that broke."""
        try:
            with anyio.fail_after(self._dead_peer_s):
                yield
        except TimeoutError as exc:
            raise PeerGone(f"nothing came from the peer for {self._dead_peer_s:g} s") from exc

    async def _pause_or_give_up(self, well_at_s: float, cause: Exception, attempt: _Attempt) -> None:
        left_s = well_at_s + self._outage_s - anyio.current_time()
        if left_s <= 0:
            raise PeerGone(
                f"the link was down for {self._outage_s:g} s: {cause}",
                may_have_reached_peer=attempt.may_have_reached_peer,
            ) from cause
        await anyio.sleep(min(left_s, self._backoff.next_s()))

    async def _drop_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.aclose()

    async def aclose(self) -> None:
        """Close the channel. The server keeps the session until it is told to forget it."""
        await self._drop_channel()


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One call over all its channels."""

    call: Call
    may_have_reached_peer: bool = False


class _Session:
    """What the server remembers of one session: the newest seq, and its answer once there is one."""

    def __init__(self, owner: str) -> None:
        self.owner: Final = owner
        self.seq = 0
        self.answer: Reply | Refusal | None = None
        self.is_done = anyio.Event()
        self.is_done.set()


class CallServer:
    """The serving side: many sessions, each over many channels, one after the other or at once.

    Use as `async with CallServer(schema) as server`; leaving cancels the handlers that still run.
    `on_error` hears of exceptions that handlers should not raise; their callers get an `internal-error`.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        max_sessions: int = limits.MAX_SESSIONS,
        max_per_owner: int = limits.MAX_SESSIONS_PER_OWNER,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._schema = schema
        self._max_sessions = max_sessions
        self._max_per_owner = max_per_owner
        self._on_error = on_error
        self._sessions: dict[bytes, _Session] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    async def __aenter__(self) -> CallServer:
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        tasks, self._tasks = self._tasks, None
        if tasks is None:
            raise LocalMisuse("a CallServer is left once")
        tasks.cancel_scope.cancel()
        return await tasks.__aexit__(exc_type, exc, traceback)

    async def serve(
        self, channel: MessageChannel, handler: Handler, *, attach: Attach | None = None, owner: str = ""
    ) -> None:
        """Serve one channel until it ends, and close it.

        Args:
            channel: speaks at least ENVELOPE_TYPES.
            handler: executes this channel's new calls; what it returns is the reply, and PeerRefused that it
                raises becomes a refusal.
            attach: the channel's first message, where the caller has received it to find the handler.
            owner: the peer's proved identity. A session belongs to the one that began it.

        Raises:
            PeerMisbehaved: the peer sent what is no call; the channel is closed, its session goes on.
        """
        try:
            if attach is None:
                first = await channel.receive()
                if not isinstance(first, Attach):
                    raise BadMessage(f"{type(first).__name__} where Attach was due")
                attach = first
            session = self._session(attach, owner)
            if isinstance(session, Refusal):
                await channel.send(session)
                return
            await channel.send(Attached())
            while True:
                call = await channel.receive()
                if not isinstance(call, Call) or call.seq < 1:
                    raise BadMessage(f"{type(call).__name__} where a call was due")
                answer = await self._answer_alive(channel, session, call, handler)
                if answer is not None:
                    await channel.send(answer)
        except PeerGone:
            # The caller dials again, or has what it wanted.
            pass
        finally:
            await channel.aclose()

    def remembers(self, session_id: bytes, owner: str) -> bool:
        """Tell whether there is such a session of that peer."""
        session = self._sessions.get(session_id)
        return session is not None and session.owner == owner

    def forget(self, session_id: bytes, owner: str | None = None) -> None:
        """Let go of a session whose caller needs no more answers; a running handler goes on.

        With `owner` only if it is that one's: who attaches to a session of somebody else must not end it.
        """
        session = self._sessions.get(session_id)
        if session is not None and owner in (None, session.owner):
            del self._sessions[session_id]

    def _session(self, attach: Attach, owner: str) -> _Session | Refusal:
        session = self._sessions.get(attach.session_id)
        # A session of somebody else looks like none at all.
        if session is not None and session.owner == owner:
            return session
        if session is not None or not attach.is_new:
            return Refusal(
                seq=0,
                code=UNKNOWN_SESSION,
                text="this session is not known here: this side was restarted since it began, or ended it",
            )
        if len(self._sessions) >= self._max_sessions:
            return Refusal(
                seq=0,
                code=TOO_MANY_SESSIONS,
                text=f"{self._max_sessions} sessions are open here, no more are taken",
            )
        owned = sum(1 for each in self._sessions.values() if each.owner == owner)
        if owned >= self._max_per_owner:
            return Refusal(
                seq=0,
                code=TOO_MANY_SESSIONS,
                text=f"{owned} sessions of {owner or 'this peer'} are open here, no more are taken",
            )
        session = self._sessions[attach.session_id] = _Session(owner)
        return session

    async def _answer_alive(
        self, channel: MessageChannel, session: _Session, call: Call, handler: Handler
    ) -> Reply | Refusal | None:
        """As `_answer`; the caller hears meanwhile that it is worked on."""
        while True:
            answer = None
            with anyio.move_on_after(limits.WORKING_EVERY_S) as waiting:
                # May be called again: the handler's task goes on by itself.
                answer = await self._answer(session, call, handler)
            if not waiting.cancelled_caught:
                return answer
            await channel.send(Working(seq=call.seq))

    async def _answer(self, session: _Session, call: Call, handler: Handler) -> Reply | Refusal | None:
        """Execute a new call, or find the answer of the newest; None for a ghost."""
        while call.seq > session.seq:
            if not session.is_done.is_set():
                # The caller gave up on the one before; it is finished first, so that order is kept.
                await session.is_done.wait()
                continue
            request = self._schema.decode(call.body)
            if self._tasks is None:
                raise LocalMisuse("serve() outside of `async with CallServer(...)`")
            session.seq = call.seq
            session.answer = None
            session.is_done = anyio.Event()
            self._tasks.start_soon(self._execute, session, call.seq, request, handler)
        if call.seq < session.seq:
            return None
        await session.is_done.wait()
        return session.answer if call.seq == session.seq else None

    async def _execute(self, session: _Session, seq: int, request: object, handler: Handler) -> None:
        answer: Reply | Refusal
        try:
            answer = Reply(seq=seq, body=self._schema.encode(await handler(request)))
        except PeerRefused as exc:
            answer = Refusal(seq=seq, code=exc.code, text=exc.text)
        except Exception as exc:
            # A task's edge: one bad handler must not end the other sessions' handlers.
            if self._on_error is not None:
                self._on_error(exc)
            answer = Refusal(
                seq=seq, code=INTERNAL_ERROR, text=f"{type(request).__name__} failed inside the other agent"
            )
        session.answer = answer
        session.is_done.set()
