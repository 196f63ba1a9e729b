"""Every state that a handover can reach, explored breadth-first over the engine's phase tables and ownership rules.

Law: phases change by `migrate.phases.advance` alone, and a record is judged by `migrate.ownership` alone. What is
modelled here by hand is which step the two agents take next, and what the world does to them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from migrate.ownership import Ownership, Verdict, is_destinations, next_generation, verdict_for_source
from migrate.phases import DESTINATION, SOURCE, Event, Phase, advance

__all__ = ["NEEDS", "RULES", "Bounds", "Result", "explore"]

RULES: Final = (
    "in doubt after COMMIT",
    "claim before resume",
    "a restarted source asks ownership",
    "create only if absent",
    "journal before COMMIT",
    "a restarted destination asks ownership",
    "digest before Loaded",
    "undecided is claimed",
    "a claim of unknown result is no claim",
    "a claim is no word that the guest runs",
    "the record is taken before a machine is ended",
    "what may be given back is never run",
)
_FIRST: Final = Ownership(guest_id="g", generation=1, owner="source", migration_id="m0")
_BY_SOURCE: Final = next_generation(_FIRST, "source", "m1")
_BY_DESTINATION: Final = next_generation(_FIRST, "destination", "m1")
_RUNS: Final = next_generation(_BY_DESTINATION, "destination", "m1")
_GIVEN_BACK: Final = next_generation(_BY_DESTINATION, "source", "m1")


class State(NamedTuple):
    """A phase of None is an agent that is down; `stop` counts the returns, and names the RAM of one stop.

    `armed_for` is the stop that the destination was last armed for, `loaded` the one whose device state it has.
    """

    source: Phase | None = Phase.PRECOPY
    destination: Phase | None = Phase.PRECOPY
    source_guest: str = "runs"
    destination_guest: str = "empty"
    source_armed: bool = False
    destination_armed: bool = False
    received: int = -1
    armed_for: int = -1
    loaded: int = -1
    stop: int = 0
    record: Ownership = _FIRST
    messages: frozenset[tuple[str, int]] = frozenset()
    faults: int = 0
    machine_died: bool = False
    has_hung_claim: bool = False
    may_be_given_back: bool = False
    has_hung_return: bool = False


class Result(NamedTuple):
    """What one exploration saw; `trace` leads to the first violation."""

    states: int
    transitions: int
    depth: int
    violation: str | None
    trace: tuple[str, ...]
    seconds: float


_Step = tuple[str, bool, State]


class Bounds(NamedTuple):
    """What is explored besides crashes and lost messages.

    `late_claims`: a claim that was given up may be recorded later, when the storage answers again.
    `may_not_start`: the hypervisor may refuse to run what was claimed.
    """

    max_faults: int = 2
    late_claims: bool = False
    may_not_start: bool = False


_ALL: Final = Bounds()
# Where crashes and lost messages alone do not show what a rule is needed for.
NEEDS: Final = {
    "a claim is no word that the guest runs": Bounds(max_faults=0, may_not_start=True),
    "the record is taken before a machine is ended": Bounds(max_faults=0, late_claims=True),
    "what may be given back is never run": Bounds(max_faults=0, may_not_start=True),
}


def _claim(s: State, wanted: Ownership, without: str) -> State:
    is_free = s.record.generation < wanted.generation or without == "create only if absent"
    return s._replace(record=wanted) if is_free else s


def _say(s: State, word: str, stop: int | None = None) -> State:
    return s._replace(messages=s.messages | {(word, s.stop if stop is None else stop)})


def _settle(s: State, without: str) -> State:
    """As `migrate.doubt.settle`, then as its caller obeys it."""
    if without != "undecided is claimed":
        s = _claim(s, _BY_SOURCE, without)
    verdict = verdict_for_source(s.record, _BY_SOURCE)
    if verdict is Verdict.TAKEN and without != "a claim is no word that the guest runs":
        return s._replace(source=Phase.IN_DOUBT)
    if verdict in (Verdict.DESTINATION, Verdict.TAKEN):
        phase = advance(SOURCE, Phase.IN_DOUBT, Event.DESTINATION_OWNS)
        return s._replace(source=phase, source_guest="gone")
    return _keep(s, advance(SOURCE, Phase.IN_DOUBT, Event.SOURCE_OWNS))


def _keep(s: State, phase: Phase) -> State:
    return s._replace(source=phase, source_guest="gone" if s.source_guest == "gone" else "runs")


def _source(s: State, without: str) -> Iterator[_Step]:
    phase = s.source
    if phase is None:
        asks = s.source_armed and without != "a restarted source asks ownership"
        yield "source restarts", False, _settle(s, without) if asks else _keep(s, Phase.ROLLED_BACK)
        if asks:
            unsure = _claim(s, _BY_SOURCE, without)._replace(source=Phase.IN_DOUBT)
            yield "source restarts, its claim fails, made", True, unsure
    elif phase is Phase.PRECOPY:
        early = without == "journal before COMMIT"
        if not s.source_armed and not early:
            yield "source journals commit-may-leave", False, s._replace(source_armed=True)
        yield "source sends Arm", False, _say(s, "Arm")
        if s.received != -1:
            yield "pages of a later round arrive", False, s._replace(received=-1)
        if (s.source_armed or early) and ("Armed", s.stop) in s.messages:
            stopped = s._replace(source=advance(SOURCE, phase, Event.CONVERGED), source_guest="stands")
            yield "source stops the guest", False, stopped
    elif phase is Phase.STOP:
        yield "last pages arrive", False, s._replace(received=s.stop)
        yield "source sends Load", False, _say(s, "Load")
        if s.stop < 2:
            back = s._replace(
                source=advance(SOURCE, phase, Event.RETURNED), source_guest="runs", stop=s.stop + 1
            )
            yield "source returns to the pre-copy", True, back
        # The answer to a Load of an earlier stop is none: a request has a number, and so has its answer.
        if ("Loaded", s.stop) in s.messages:
            yield (
                "source sends Commit",
                False,
                _say(s._replace(source=advance(SOURCE, phase, Event.READY)), "Commit"),
            )
    elif phase is Phase.SWITCHOVER:
        words = {word for word, _ in s.messages}
        if "Running" in words:
            over = s._replace(source=advance(SOURCE, phase, Event.PEER_RUNNING), source_guest="gone")
            yield "source hears Running", False, over
        if "CommitRefused" in words:
            yield "source hears CommitRefused", False, _keep(s, advance(SOURCE, phase, Event.PEER_REFUSED))
        if without == "in doubt after COMMIT":
            yield "source times out", True, _keep(s, Phase.ROLLED_BACK)
        else:
            yield "source hears nothing", False, s._replace(source=advance(SOURCE, phase, Event.FAULT))
    elif phase is Phase.IN_DOUBT:
        yield "source settles", False, _settle(s, without)
        yield "source's claim fails, made", True, _claim(s, _BY_SOURCE, without)
    if phase in (Phase.PRECOPY, Phase.STOP):
        yield (
            "source fails and rolls back",
            False,
            _say(_keep(s, advance(SOURCE, phase, Event.FAULT)), "Abort"),
        )


def _destination(s: State, without: str, bounds: Bounds) -> Iterator[_Step]:
    phase, words = s.destination, {word for word, _ in s.messages}
    if phase is None or phase is Phase.IN_DOUBT:
        blind = without == "a restarted destination asks ownership" and s.destination_armed
        owns = is_destinations(s.record, _BY_DESTINATION) or blind
        returns = s.may_be_given_back and without != "what may be given back is never run"
        if owns and returns and s.record == _BY_DESTINATION:
            yield "destination gives back again", False, _claim(s, _GIVEN_BACK, without)
        elif owns and s.destination_guest != "gone":
            yield (
                "destination recovers and runs",
                False,
                s._replace(destination=Phase.COMPLETE, destination_guest="runs"),
            )
        elif not owns:
            blocks = s.destination_armed and without != "the record is taken before a machine is ended"
            fenced = _claim(s, _BY_SOURCE, without) if blocks else s
            yield (
                "destination recovers and ends its machine",
                False,
                # Its journal is ended: to a Commit that comes now it is a move that nobody knows.
                fenced._replace(
                    destination=Phase.ROLLED_BACK, destination_guest="gone", destination_armed=False
                ),
            )
    elif phase is Phase.PRECOPY:
        # A request that is older than one that was obeyed is a ghost of a dead channel.
        for stop in (stop for word, stop in s.messages if word == "Arm" and stop >= s.armed_for):
            armed = s._replace(destination_armed=True, armed_for=stop)
            yield "destination answers Armed", False, _say(armed, "Armed", stop)
        # By the digest that came with Load: of a stop that was left the pages may all be here.
        proved = s.received == s.armed_for or without == "digest before Loaded"
        if ("Load", s.armed_for) in s.messages and s.destination_armed and proved:
            loaded = s._replace(destination=advance(DESTINATION, phase, Event.READY), loaded=s.armed_for)
            yield "destination answers Loaded", False, _say(loaded, "Loaded", s.armed_for)
    elif phase is Phase.STOP:
        if "Commit" in words:
            yield (
                "destination obeys Commit",
                False,
                s._replace(destination=advance(DESTINATION, phase, Event.COMMIT)),
            )
    elif phase is Phase.SWITCHOVER:
        claimed = s if without == "claim before resume" else _claim(s, _BY_DESTINATION, without)
        if claimed.record == _BY_DESTINATION or without == "claim before resume":
            # Two steps, and a crash fits between: the record is made, then the guest runs.
            if claimed != s:
                yield "destination claims", False, claimed
            else:
                ran = s._replace(
                    destination=advance(DESTINATION, phase, Event.RUNNING), destination_guest="runs"
                )
                yield "destination runs the guest", False, _say(ran, "Running")
                if bounds.may_not_start:
                    yield from _does_not_start(s, without)
        else:
            lost = s._replace(
                destination=advance(DESTINATION, phase, Event.SOURCE_OWNS), destination_guest="gone"
            )
            yield "destination gives way", False, _say(lost, "CommitRefused")
        if s.record.generation == 1:
            doubt = advance(DESTINATION, phase, Event.FAULT)
            yield "claim fails, not made", True, s._replace(destination=doubt)
            yield "claim fails, made", True, claimed._replace(destination=doubt)
            if bounds.late_claims:
                yield "claim hangs", True, s._replace(destination=doubt, has_hung_claim=True)
            if without == "a claim of unknown result is no claim":
                yield (
                    "claim fails, run anyway",
                    True,
                    s._replace(destination=Phase.COMPLETE, destination_guest="runs"),
                )
    elif phase is Phase.COMPLETE and s.record == _BY_DESTINATION:
        yield "destination says that the guest runs", False, _claim(s, _RUNS, without)
    elif phase is Phase.ROLLED_BACK and s.destination_armed and "Commit" in words:
        yield "destination refuses Commit", False, _say(s, "CommitRefused")
    if phase in (Phase.PRECOPY, Phase.STOP) and "Abort" in words:
        ended = advance(DESTINATION, phase, Event.FAULT)
        yield "destination obeys Abort", False, s._replace(destination=ended, destination_guest="gone")


def _does_not_start(s: State, without: str) -> Iterator[_Step]:
    """The hypervisor refuses to run what was claimed: the guest goes back, by a record."""
    s = s._replace(may_be_given_back=True)  # in its journal, before the record
    back = _claim(s, _GIVEN_BACK, without)
    lost = advance(DESTINATION, Phase.SWITCHOVER, Event.SOURCE_OWNS)
    gave_way = back._replace(destination=lost, destination_guest="gone")
    yield "guest does not start, is given back", True, _say(gave_way, "CommitRefused")
    doubt = advance(DESTINATION, Phase.SWITCHOVER, Event.FAULT)
    yield "guest does not start, give-back fails, made", True, back._replace(destination=doubt)
    yield "guest does not start, give-back fails, not made", True, s._replace(destination=doubt)
    hung = s._replace(destination=doubt, has_hung_return=True)
    yield "guest does not start, give-back hangs", True, hung


def _world(s: State, without: str, bounds: Bounds) -> Iterator[_Step]:
    # A message stays until it is lost: it may be delivered late, twice, and in any order.
    for message in s.messages:
        yield f"{message[0]} is lost", True, s._replace(messages=s.messages - {message})
    if s.has_hung_claim:
        landed = _claim(s, _BY_DESTINATION, without)
        yield "the hung claim is recorded", True, landed._replace(has_hung_claim=False)
    if s.has_hung_return:
        landed = _claim(s, _GIVEN_BACK, without)
        yield "the hung give-back is recorded", True, landed._replace(has_hung_return=False)
    if s.faults == bounds.max_faults:
        return
    hit = s._replace(faults=s.faults + 1)
    if s.source is not None and s.source not in (Phase.COMPLETE, Phase.ROLLED_BACK):
        yield "source agent crashes", True, hit._replace(source=None)
        yield (
            "source machine crashes",
            True,
            hit._replace(source=None, source_guest="gone", machine_died=True),
        )
    # Its journal is ended after the word that the guest runs: until then a restart looks at it again.
    is_over = s.destination is Phase.COMPLETE and s.record != _BY_DESTINATION
    if s.destination is not None and s.destination is not Phase.ROLLED_BACK and not is_over:
        yield "destination agent crashes", True, hit._replace(destination=None)
        died = hit._replace(destination=None, destination_guest="gone", machine_died=True)
        yield "destination machine crashes", True, died


def _violation(s: State) -> str | None:
    if s.source_guest == s.destination_guest == "runs":
        return "two copies run"
    if s.destination_guest == "runs" and s.received != s.stop:
        return "a copy runs whose RAM is not whole"
    if s.destination_guest == "runs" and s.loaded != s.stop:
        return "a copy runs with the device state of another stop"
    if s.destination_guest == "runs" and not is_destinations(s.record, _BY_DESTINATION):
        return "a copy runs that does not own the guest"
    if s.source_guest == "runs" and is_destinations(s.record, _BY_DESTINATION):
        return "the source runs what belongs to the destination"
    return None


def explore(without: str = "", bounds: Bounds = _ALL) -> Result:
    """Visit every state; stop at the first that breaks an invariant, or from which no copy can ever run."""
    began_s, start = time.perf_counter(), State()
    seen: dict[State, tuple[State, str] | None] = {start: None}
    depths, back = {start: 0}, dict[State, list[State]]()
    queue, transitions = deque([start]), 0

    def result(wrong: State | None, words: str | None) -> Result:
        trace: list[str] = []
        while wrong is not None and (step := seen[wrong]) is not None:
            wrong, name = step
            trace.append(name)
        seconds = time.perf_counter() - began_s
        return Result(len(seen), transitions, max(depths.values()), words, tuple(reversed(trace)), seconds)

    while queue:
        s = queue.popleft()
        if (words := _violation(s)) is not None:
            return result(s, words)
        for steps in (_source(s, without), _destination(s, without, bounds), _world(s, without, bounds)):
            for name, is_fault, after in steps:
                transitions += 1
                if not is_fault:
                    back.setdefault(after, []).append(s)
                if after not in seen:
                    seen[after], depths[after] = (s, name), depths[s] + 1
                    queue.append(after)
    alive = {s for s in seen if (s.source_guest == "runs") != (s.destination_guest == "runs")}
    todo = list(alive)
    while todo:
        for before in back.get(todo.pop(), ()):
            if before not in alive:
                alive.add(before)
                todo.append(before)
    for s in seen:
        if s not in alive and not s.machine_died:
            return result(s, "the guest can never run again")
    return result(None, None)
