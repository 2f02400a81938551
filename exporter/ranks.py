"""Several processes for one run, as torchrun and `accelerate launch` start them: a share each, one result.

All of them run the same code and make the same batches of questions; process r of n takes batches r, r + n, and so on.
What a batch has said is handed to all, and added up in the order of the batches, as one process does. Sums that are too
large for that are added exactly, so that no order counts (exporter/fold/moments.py). The first process alone writes and
prints. With one process every function here is the identity.

A process that fails leaves its reason in the store that they share before it ends. The others meet the end of its
connection where they wait for it next, and end with the same reason, which one of them prints.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import CheckFailed, InputError
from .version import code_hash, versions

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
SHARED = ("compress", "evaluate", "heal", "route", "score")  # what they can do, a share of the questions each
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by which a launcher tells of the others
MEETING = timedelta(minutes=5)  # that all may take to be there
WAITING = timedelta(days=30)  # for a share; a process that ends is noticed by its connection, not by a clock
LAST_WORDS_S = 5.0  # that are waited for where a connection ends
FAILED, REASON = "lvlm-exporter failed", "lvlm-exporter reason"  # keys in the store
MISSING: Any = object()


class PeerLost(RuntimeError):  # noqa: N818 - like CheckFailed, what was met and no fault
    """Another process of the run has ended, and left no reason that could be put right."""


@dataclass(frozen=True)
class Group:
    """The processes of one run, as each of them knows them."""

    rank: int
    world: int
    local_rank: int  # among those on this machine
    store: Any
    places: Sequence[tuple[str, int]] = ()  # host and process id of each
    handle: Any = None  # of torch.distributed; None: its default group


_group: Group | None = None
_meetings: list[Any] = []  # so far: the store, again and again
_alone = False  # in what the first process computes while the others wait, it is the only one
_silent = False  # another process says why the run has ended
_unmet = False  # nobody else can say it: the others were not met


def _handle() -> Any:
    return None if _group is None else _group.handle


def _shared() -> Group | None:
    """Return the processes that share what is computed now."""
    return None if _alone else _group


def rank() -> int:
    """Return the number of this process; the first one, 0, writes and prints."""
    return 0 if (group := _shared()) is None else group.rank


def world() -> int:
    """Return how many processes there are."""
    return 1 if (group := _shared()) is None else group.world


def is_first() -> bool:
    return rank() == 0


def is_silent() -> bool:
    """Tell whether another process says why the run has ended: the first on this machine, before they have met."""
    if _group is None and launched() > 1:
        return not _unmet and os.environ.get("LOCAL_RANK", "0") != "0"
    return _silent


# --- shares -----------------------------------------------------------------------------------------------------------


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items that this process takes."""
    return items[rank() :: world()] if world() > 1 else items


def gathered(items: Iterable[T]) -> list[T]:
    """Return what all processes have made of their shares, in the order of the whole."""
    if _shared() is None:
        return list(items)
    rounds = itertools.zip_longest(*_of_all(list(items)), fillvalue=MISSING)
    return [item for some in rounds for item in some if item is not MISSING]


def in_order(items: Iterable[T]) -> Iterator[T]:
    """Yield the same one by one, as they are made: at most one of each process is held."""
    if _shared() is None:
        yield from items
        return
    mine = iter(items)
    while True:
        item = next(mine, MISSING)
        there = [some for some in _of_all([] if item is MISSING else [item]) if some]
        yield from itertools.chain.from_iterable(there)
        if len(there) < world():
            # Shares differ by one at most; and what makes the items comes to its end.
            assert next(mine, MISSING) is MISSING
            return


def tensors_in_order(
    items: Iterable[Sequence[Tensor]], number: int, shapes: Sequence[Sequence[int]]
) -> Iterator[Sequence[Tensor]]:
    """Yield what `in_order` yields, where items are float32 tensors of the same shapes: quicker than Python objects.

    Args:
        number: of the items of all processes.
    """
    if _shared() is None:
        yield from items
        return
    import torch
    from torch import distributed

    mine, sizes = iter(items), [math.prod(shape) for shape in shapes]
    for begin in range(0, number, world()):
        there = min(world(), number - begin)
        flat = torch.zeros(sum(sizes))
        if rank() < there:
            flat = torch.cat([tensor.detach().flatten().cpu() for tensor in next(mine)])
        everyone = [torch.empty_like(flat) for _ in range(world())]
        _together(functools.partial(distributed.all_gather, everyone, flat, group=_handle()))
        for theirs in everyone[:there]:
            yield [part.view(shape) for part, shape in zip(torch.split(theirs, sizes), shapes, strict=True)]


def total(number: int) -> int:
    """Return the sum of a whole number over all processes."""
    return number if _shared() is None else sum(_of_all(number))


def summed(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place, in no certain order. Only the first one has the sum."""
    if _shared() is not None:
        from torch import distributed

        _together(lambda: distributed.reduce(tensor, dst=0, group=_handle()))
    return tensor


def from_first(compute: Callable[[], T]) -> T:
    """Return what the first process computes as if it were the only one; the others wait for it, and compute nothing.

    Tensors among it are to be on the CPU.
    """
    global _alone
    if _shared() is None:
        return compute()
    from torch import distributed

    values: list[Any] = [None]
    if is_first():
        _alone = True
        try:
            values = [compute()]
        finally:
            _alone = False
    _together(lambda: distributed.broadcast_object_list(values, src=0, group=_handle()))
    result: T = values[0]
    return result


def same(parts: Mapping[str, object]) -> None:
    """Raise InputError where processes differ in what they are to do, by name."""
    if _shared() is None:
        return
    digests = {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}
    everyone = _of_all(digests)
    for number, theirs in enumerate(everyone):
        if differing := [name for name in everyone[0] if theirs.get(name) != everyone[0][name]]:
            raise InputError(
                f"the processes of one run differ in {' and '.join(differing)}: process {number} has not what process "
                "0 has. Start all of them with the same command and files, on machines set up alike."
            )


def local_rank() -> int:
    """Return the number of this process among those on its machine."""
    return 0 if (group := _shared()) is None else group.local_rank


def _of_all(value: T) -> list[T]:
    """Return everyone's value, by the numbers of the processes."""
    from torch import distributed

    values: list[Any] = [None] * world()
    _together(lambda: distributed.all_gather_object(values, value, group=_handle()))
    return values


# --- their beginning and their end ------------------------------------------------------------------------------------


def launched() -> int:
    """Return how many processes a launcher has started for this run; 1: none has."""
    values = [os.environ.get(name, "") for name in VARIABLES]
    return int(values[1]) if all(values) and values[0].isdigit() and values[1].isdigit() else 1


@contextlib.contextmanager
def joined(what: str, shared: Collection[str], words: Sequence[str]) -> Iterator[None]:
    """Do the work of the block together with the other processes that a launcher has started; alone where none has.

    The process is to end where the block fails.

    Args:
        what: is done, by its name.
        shared: names of what several processes can do.
        words: of the command line.
    Raises: InputError where they can't do this together, do not meet, or differ.
    """
    if (number := launched()) < 2:
        yield
        return
    if what not in shared:
        raise InputError(
            f"`{what}` runs in one process, and {number} were started: start it without torchrun or accelerate. "
            f"Several share the work of {', '.join(f'`{name}`' for name in sorted(shared))}."
        )
    with _meeting({"the command line": list(words)}, ending=True):
        yield


@functools.cache
def entry_point(function: F) -> F:
    """Return a function that all processes of a launcher do together where a program calls it in each of them.

    Where it fails in one of them, it fails in all, for the same reason; then they may call for something else.
    """

    @functools.wraps(function)
    def together(*args: Any, **kwargs: Any) -> Any:
        if _group is not None or launched() < 2:
            return function(*args, **kwargs)
        with _meeting({"the function that they call": function.__name__}, ending=False):
            return function(*args, **kwargs)

    return cast("F", together)


@contextlib.contextmanager
def _meeting(alike: Mapping[str, object], ending: bool) -> Iterator[None]:
    """Meet the others for the time of the block.

    Args:
        alike: what has to be the same in all, by name.
        ending: the process ends where the block fails; else the others learn of it since this one leaves.
    """
    global _group, _silent
    _group, _silent = _met(), False
    try:
        with contextlib.ExitStack() as quiet:
            if not is_first():
                _hush(quiet)
            same({**alike, **_surroundings()})
            yield
    except BaseException as error:
        if ending:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that has seen another one end
        _silent = not _said_first(_group, error)
        if not ending:
            _leave()
        raise
    _leave()


def interrupted(*_: Any) -> None:
    """Raise why the run is to end: a launcher ends all processes where one of them has ended."""
    if _group is not None:
        if (reason := _reason_in(_group)) is not None:
            raise reason
        if lost := _ended(_group):
            raise _lost(lost)
    raise KeyboardInterrupt


def _surroundings() -> dict[str, object]:
    """Return what has to be alike for all processes to compute the same, by names for a message."""
    import torch

    return {
        "the versions of Python and of packages": versions(),
        "the code of this package": code_hash(),
        "the number of threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "the kind of processor": torch.backends.cpu.get_cpu_capability(),
    }


def _met() -> Group:
    global _unmet
    from torch import distributed

    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, handle = _store(number, count), None
        if distributed.is_initialized():  # by the program that calls, maybe for another backend
            handle = distributed.new_group(backend="gloo", timeout=WAITING)
        else:
            distributed.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=WAITING)
        places: list[Any] = [None] * count
        distributed.all_gather_object(places, (socket.gethostname(), os.getpid()), group=handle)
    except (RuntimeError, ValueError, OSError) as error:
        _unmet = True
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"process {number} of {count} has not met the others at {address} ({reason}): start all of them by one "
            "launcher, and let all of them call for the same; or unset WORLD_SIZE for a single process."
        ) from error
    local = int(os.environ.get("LOCAL_RANK", number))
    return Group(rank=number, world=count, local_rank=local, store=store, places=places, handle=handle)


def _store(number: int, count: int) -> Any:
    """Return the store of a new meeting, once all processes are there: the place of the first one, with own names."""
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    place = _meetings[0] if _meetings else next(rendezvous("env://", timeout=MEETING))[0]
    _meetings.append(place)
    store = distributed.PrefixStore(f"lvlm-exporter {len(_meetings)}", place)  # type: ignore[attr-defined]
    store.set(f"here {number}", "")
    store.wait([f"here {other}" for other in range(count)], MEETING)
    return store


def _hush(stack: contextlib.ExitStack) -> None:
    """Leave printing, and warnings, to the first process."""
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.ERROR)


def _leave() -> None:
    global _group
    from torch import distributed

    handle, _group = _handle(), None
    distributed.destroy_process_group(handle)


def _together(call: Callable[[], object]) -> None:
    """Do what all processes do at once. Raises why another one has ended, where one has."""
    assert _group is not None
    try:
        call()
    except RuntimeError as error:
        latest = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < latest:
            if (reason := _reason_in(_group)) is not None:
                raise reason from (reason.__cause__ or error)
            if lost := _ended(_group):
                raise _lost(lost) from error
            time.sleep(0.05)
        raise _lost([]) from error


def _lost(numbers: Sequence[int]) -> PeerLost:
    which = f"process {numbers[0]}" if numbers else "a process"
    return PeerLost(
        f"{which} of {world()} has ended without a word, as one does that is killed or finds no memory: the others "
        "have ended too, and nothing was written. Start all of them again."
    )


def _ended(group: Group) -> list[int]:
    """Return the processes on this machine that are there no more."""
    here = socket.gethostname()
    return [number for number, (host, pid) in enumerate(group.places) if host == here and not _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def _said_first(group: Group, error: BaseException) -> bool:
    """Leave the reason of an end to the others; tell whether this process is the first that ends, and says why."""
    kinds = (("input", InputError), ("check", CheckFailed), ("interrupted", KeyboardInterrupt))
    kind = next((name for name, types in kinds if isinstance(error, types)), "lost")
    if kind == "input" and isinstance(error.__cause__, OSError):
        kind = "system"  # what is finished is kept then (compression/stages.py)
    try:
        if group.store.add(FAILED, 1) > 1:
            return False
        group.store.set(REASON, json.dumps([kind, str(error), group.rank]))
    except RuntimeError:  # the store has gone with the process that held it
        return is_first()
    return True


def _reason_in(group: Group) -> BaseException | None:
    """Return why another process has ended, where it has said so: this one is silent then."""
    global _silent
    try:
        if not group.store.check([REASON]):
            return None
        kind, message, number = json.loads(group.store.get(REASON))
    except RuntimeError:
        return None
    known: dict[str, type[BaseException]] = {
        "input": InputError,
        "system": InputError,
        "check": CheckFailed,
        "interrupted": KeyboardInterrupt,
    }
    reason = known[kind](message) if kind in known else _lost([number])
    reason.__cause__ = OSError(message) if kind == "system" else None
    _silent = True  # at once: a launcher's signal may raise the reason again before `joined` gets to it
    return reason
