"""Where the time of a step goes: a profiler's trace, added up by part. Pure functions over the trace's events.

    shares = time_shares(json.load(trace)["traceEvents"])       # {"data": 0.02, "vision": 0.31, "llm": 0.55, ...}

The parts are marked by ranges named ``mgm_exp::<part>`` where the work is asked for. A backward pass belongs to the
part whose forward pass it undoes, which autograd's sequence numbers tell; what a GPU computes belongs to the part that
launched it. On a CPU the time is that of the thread that trains; on a GPU it is the device's: an instant in which it
computes belongs to what it computes, else to data or communication where the process waits for these, else to ``other``
(the device is idle: Python, launches, reading results).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "mgm_exp::"
DATA, VISION, LLM, OPTIMIZER, COMMUNICATION, OTHER = "data", "vision", "llm", "optimizer", "communication", "other"
PARTS = (DATA, VISION, LLM, OPTIMIZER, COMMUNICATION, OTHER)
# Names of what torch itself calls an exchange between processes, in lower case.
_EXCHANGES = ("nccl", "gloo", "c10d::", "record_param_comms")
_ON_HOST = ("cpu_op", "user_annotation")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = "ProfilerStep#"
Event = Mapping[str, Any]
Segment = tuple[float, float, str]


@dataclass(frozen=True)
class TimeShares:
    """Where the recorded steps went.

    Args:
        shares: Part -> share of the time, all of :data:`PARTS`; they add up to 1.
        seconds: Of all recorded steps together.
        steps: How many they are.
        busy: Share of the time in which the GPU computed or copied; None: there is none.
    """

    shares: dict[str, float]
    seconds: float
    steps: int
    busy: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds_per_step": round(self.seconds / self.steps, 6),
            "shares": {part: round(share, 4) for part, share in self.shares.items()},
            "device_busy": None if self.busy is None else round(self.busy, 4),
        }

    @property
    def in_words(self) -> str:
        """The parts that count, the largest first."""
        names = {LLM: "LLM", DATA: "waiting for data"}
        largest = sorted(self.shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{names.get(part, part)} {share:.0%}" for part, share in largest if share >= 0.005)
        busy = "" if self.busy is None else f"; the GPU is busy for {self.busy:.0%} of the time"
        return f"{self.steps} steps of {self.seconds / self.steps:.3g} s: {told}{busy}"


def time_shares(events: Iterable[Event]) -> TimeShares | None:
    """Adds the events of a Chrome trace up.

    Returns:
        None where no whole step was recorded.
    """
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    on_device: list[Event] = []
    steps: list[Event] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        kind = event.get("cat")
        if kind in _ON_HOST:
            by_thread[event["tid"]].append(event)
            if kind == "user_annotation" and event["name"].startswith(_STEP):
                steps.append(event)
        elif kind in _ON_DEVICE:
            on_device.append(event)
    if not steps:
        return None
    begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    segments, parts = _host(by_thread, steps[0]["tid"])
    mine = _clipped(segments[steps[0]["tid"]], begin, end)
    if on_device:
        end = max(end, *(event["ts"] + event["dur"] for event in on_device))
        found, busy = _device(on_device, parts, mine, begin, end)
    else:
        found, busy = _sums(mine), None
    seconds = (end - begin) / 1e6
    known = {part: found.get(part, 0.0) / 1e6 / seconds for part in PARTS if part != OTHER}
    shares = {**known, OTHER: max(0.0, 1.0 - sum(known.values()))}
    return TimeShares(shares, seconds, len(steps), busy)


# -- the host ----------------------------------------------------------------------------------------------------------


def _host(by_thread: Mapping[Any, list[Event]], main: Any) -> tuple[dict[Any, list[Segment]], dict[Any, str]]:
    """Each thread's time as segments with their parts, and the part of each event by its external id.

    Args:
        main: The thread that trains; a GPU's backward pass runs in one of autograd's own.
    """
    ordered = {thread: sorted(events, key=lambda e: (e["ts"], -e["dur"])) for thread, events in by_thread.items()}
    numbered = [number for events in ordered.values() for e in events if (number := _argument(e, "Fwd thread id"))]
    known = _Forward(min(numbered, default=0))
    for _ in range(2):  # what is computed again in a backward pass has the part of what asks for it
        for thread, events in ordered.items():
            for event, part in _parts(events, known):
                if part is not None:
                    known.note(event, thread == main, part)
    segments: dict[Any, list[Segment]] = {}
    by_id: dict[Any, str] = {}
    for thread, events in ordered.items():
        told = list(_parts(events, known))
        for event, part in told:
            identity = _argument(event, "External id")
            if identity is not None and part is not None:
                by_id[identity] = part
        segments[thread] = _self_times(told)
    return segments, by_id


class _Forward:
    """Parts of the forward pass's operations, by autograd's sequence numbers, which each thread counts by itself.

    Args:
        main: The number that autograd gives the thread that trains, the first one of all.
    """

    def __init__(self, main: int) -> None:
        self._main = main
        self._parts: dict[tuple[bool, int], str] = {}

    def note(self, event: Event, is_main: bool, part: str) -> None:
        """Takes in an operation; the last one with a number made the node that has it."""
        number = _argument(event, "Sequence number")
        if number is not None and not _argument(event, "Fwd thread id"):
            self._parts[is_main, number] = part

    def part_of(self, event: Event) -> str | None:
        """Of an operation of the backward pass; None: it is none."""
        thread = _argument(event, "Fwd thread id")
        return self._parts.get((thread == self._main, _argument(event, "Sequence number")), LLM) if thread else None


def _parts(events: Sequence[Event], known: _Forward) -> Iterable[tuple[Event, str | None]]:
    """Each event with its part: its own, or that of the event around it."""
    around: list[tuple[float, str | None]] = []
    for event in events:
        while around and around[-1][0] <= event["ts"]:
            around.pop()
        part = _own_part(event, known) or (around[-1][1] if around else None)
        around.append((event["ts"] + event["dur"], part))
        yield event, part


def _own_part(event: Event, known: _Forward) -> str | None:
    name = str(event["name"])
    if name.startswith(PREFIX):
        return name[len(PREFIX) :]
    if _is_exchange(name):
        return COMMUNICATION
    return known.part_of(event) or (LLM if name.startswith("autograd::engine::evaluate_function") else None)


def _self_times(told: Sequence[tuple[Event, str | None]]) -> list[Segment]:
    """The time of nested events, each instant given to the innermost one."""
    found: list[Segment] = []
    around: list[tuple[float, str]] = []
    now = 0.0

    def until(moment: float) -> None:
        nonlocal now
        while around and around[-1][0] <= moment:
            end, part = around.pop()
            if end > now:
                found.append((now, end, part))
                now = end
        if around and moment > now:
            found.append((now, moment, around[-1][1]))
        now = max(now, moment)

    for event, part in told:
        until(event["ts"])
        around.append((event["ts"] + event["dur"], part or OTHER))
    until(float("inf"))
    return found


# -- the device --------------------------------------------------------------------------------------------------------


def _device(
    events: Sequence[Event], parts: Mapping[Any, str], host: Sequence[Segment], begin: float, end: float
) -> tuple[dict[str, float], float]:
    """Time by part as the device has it, and its busy share."""
    busy: list[Segment] = []
    for event in events:
        part = parts.get(_argument(event, "External id"), OTHER)
        if _is_exchange(str(event["name"])):
            part = COMMUNICATION
        elif event.get("cat") == "gpu_memcpy" and "HtoD" in str(event["name"]) and part in (LLM, OTHER):
            part = DATA  # batches on their way to the device
        busy.append((event["ts"], event["ts"] + event["dur"], part))
    computing = [segment for segment in busy if segment[2] not in (COMMUNICATION, DATA)]
    moving = [segment for segment in busy if segment[2] in (COMMUNICATION, DATA)]
    waiting = [segment for segment in host if segment[2] in (COMMUNICATION, DATA)]
    # An exchange that hides behind a computation costs nothing; neither does a wait while the device works
    found: dict[str, float] = defaultdict(float)
    covered: list[Segment] = []
    occupied = 0.0
    for layer in (computing, moving, waiting):
        free = _outside(_flattened(_clipped(layer, begin, end)), covered)
        for part, time in _sums(free).items():
            found[part] += time
            occupied += time if layer is not waiting else 0.0
        covered = _flattened([*covered, *free])
    return found, occupied / (end - begin)


def _flattened(segments: Sequence[Segment]) -> list[Segment]:
    """Ordered and without overlaps: an instant belongs to the segment that began first."""
    found: list[Segment] = []
    now = float("-inf")
    for start, end, part in sorted(segments):
        if end > now:
            found.append((max(start, now), end, part))
            now = end
    return found


def _outside(segments: Sequence[Segment], covered: Sequence[Segment]) -> list[Segment]:
    """What of the segments nothing covers; both ordered and without overlaps."""
    found: list[Segment] = []
    place = 0
    for start, end, part in segments:
        while place < len(covered) and covered[place][1] <= start:
            place += 1
        at, now = place, start
        while at < len(covered) and covered[at][0] < end:
            if covered[at][0] > now:
                found.append((now, covered[at][0], part))
            now = max(now, covered[at][1])
            at += 1
        if now < end:
            found.append((now, end, part))
    return found


def _clipped(segments: Sequence[Segment], begin: float, end: float) -> list[Segment]:
    return [(max(a, begin), min(b, end), part) for a, b, part in segments if b > begin and a < end]


def _sums(segments: Sequence[Segment]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for start, end, part in segments:
        found[part] += end - start
    return found


def _argument(event: Event, name: str) -> Any:
    return (event.get("args") or {}).get(name)


def _is_exchange(name: str) -> bool:
    lower = name.lower()
    return any(word in lower for word in _EXCHANGES)
