"""Several processes on one run: what is dealt out to them, and what the first of them does for all.

``torchrun --nproc-per-node N -m sphere_edit edit …`` starts N processes, the ranks 0 to N − 1. Each runs the whole program, in step with
the others, on a whole copy of the model. Work on many facts or texts is cut into the same parts whatever N is; part i goes to rank
i mod N, and every rank gets all results, in the order of the parts. So no sum depends on N, and neither does a single bit. What touches the
disk, draws random numbers or looks at a clock is done by rank 0, and the others get what came of it.

Outside `joined` there is one rank, and nothing here does anything. Results travel through memory of the CPU by gloo, within the group of
processes that were started together; torch.distributed pickles them, and nothing of it is ever stored or read from a file.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sphere_edit.errors import SphereEditError

Part = TypeVar("Part")
Result = TypeVar("Result")

# for what one rank does alone; that a rank has died is noticed at once, by its connection
_PATIENCE = timedelta(days=2)
_WHY = "why-rank-{}-ended"


class LostRank(SphereEditError):
    """Another rank has ended before the work was done."""


@dataclass(frozen=True)
class _Team:
    """The ranks of a run, seen by one of them."""

    group: Any  # of torch.distributed
    store: Any
    rank: int
    size: int

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, by rank; its own as it is."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._listening():
            dist.all_gather_object(found, _packed(value), group=self.group)
        return [value if rank == self.rank else _unpacked(packed) for rank, packed in enumerate(found)]

    def given(self, value: Any, by: int) -> Any:
        """What rank ``by`` has for ``value``."""
        import torch.distributed as dist

        sent = [_packed(value) if self.rank == by else b""]
        with self._listening():
            dist.broadcast_object_list(sent, src=dist.get_global_rank(self.group, by), group=self.group)
        return value if self.rank == by else _unpacked(sent[0])

    def meet(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        with self._listening():
            dist.barrier(group=self.group)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # of gloo: the other side has closed its connection
            raise LostRank(self._lost()) from None

    def _lost(self) -> str:
        """Why this rank cannot go on, with the words of the one that ended, if it left any."""
        why = ""
        for rank in range(self.size):
            with suppress(Exception):  # the store may have gone with it
                if rank != self.rank and self.store.check([_WHY.format(rank)]):
                    why = f", rank {rank}: {self.store.get(_WHY.format(rank)).decode()}"
        return (
            f"another of the {self.size} processes of this run has ended{why}. Every committed batch is kept; go on with --resume, "
            "with any number of processes"
        )

    def leave_word(self, error: BaseException) -> None:
        """Tell the others why this rank ends, should it do so alone."""
        with suppress(Exception):  # the store may be gone
            self.store.set(_WHY.format(self.rank), " ".join(str(error).split()) or type(error).__name__)


_team: ContextVar[_Team | None] = ContextVar("team", default=None)


# --- what the rest of the package asks ----------------------------------------------------------------------------


def leads() -> bool:
    """Whether this process writes and speaks: the only one, or rank 0 of several."""
    team = _team.get()
    return team is None or team.rank == 0


def count() -> int:
    """How many ranks work on what is done here."""
    team = _team.get()
    return 1 if team is None else team.size


def dealt(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """What ``work`` makes of each part, in their order, on every rank; part i is done by rank i mod N.

    Raises:
        Exception: what the first part that failed raised, on every rank.
    """
    team = _team.get()
    if team is None:
        return [work(part) for part in parts]
    done: dict[int, Result] = {}
    failed: dict[int, Exception] = {}
    with _alone():
        for index in range(team.rank, len(parts), team.size):
            try:
                done[index] = work(parts[index])
            except Exception as error:
                failed[index] = _portable(error)
                break
    for others_done, others_failed in team.gathered((done, failed)):
        done |= others_done
        failed |= others_failed
    if failed:
        raise failed[min(failed)]
    return [done[index] for index in range(len(parts))]


def in_turn(parts: Sequence[Part], work: Callable[[Part], Result]) -> Iterator[Result]:
    """As `dealt`, one part a rank at a time: no more is done than is asked for, and no more is held."""
    for first in range(0, len(parts), count()):
        yield from dealt(parts[first : first + count()], work)


def once(work: Callable[[], Result], by: int = 0) -> Result:
    """What ``work`` gives on one rank, number ``by`` mod N, on all of them; it begins when every rank has come here.

    Raises:
        Exception: what it raised there, on every rank.
    """
    team = _team.get()
    if team is None:
        return work()
    team.meet()
    outcome: tuple[Any, Exception | None] = None, None
    if team.rank == by % team.size:
        with _alone():
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, _portable(error)
    result, failure = team.given(outcome, by % team.size)
    if failure is not None:
        raise failure
    return result


def agree(value: object) -> bool:
    """Whether every rank has this value."""
    team = _team.get()
    return team is None or all(other == value for other in team.gathered(value))


@contextmanager
def told(advance: Callable[[float], object]) -> Iterator[Callable[[float], None]]:
    """Progress of dealt work: each rank's own as it comes, and that of the others at the end."""
    team, sums = _team.get(), [0.0]

    def tell(amount: float) -> None:
        sums[0] += amount
        advance(amount)

    yield tell
    if team is not None:
        advance(sum(team.gathered(sums[0])) - sums[0])


# --- how ranks come together --------------------------------------------------------------------------------------


def started() -> int:
    """How many processes torchrun, or what is like it, has started together with this one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process works with the others that were started with it, each on an accelerator of its own where there are any.

    Raises:
        SphereEditError: they do not find one another.
    """
    if started() == 1:
        yield
        return
    team = _together()
    token = _team.set(team)
    previous = signal.signal(signal.SIGTERM, _stopped)
    try:
        yield
        team.meet()
    except BaseException as error:
        team.leave_word(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        _team.reset(token)
        _apart()


def _together() -> _Team:
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    try:
        if dist.is_initialized():
            raise SphereEditError("torch.distributed is in use already in this process")
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=size, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise SphereEditError(f"the {started()} processes of this run do not find one another: {error}") from None
    return _Team(dist.group.WORLD, store, rank, size)


def _apart() -> None:
    import torch.distributed as dist

    with suppress(Exception):  # of a group that has lost a rank
        dist.destroy_process_group()


def _stopped(number: int, frame: object) -> None:
    """What torchrun sends to the others when one process has ended."""
    raise LostRank("stopped from outside; every committed batch is kept. Go on with --resume")


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, this rank works for itself: nothing waits for the others."""
    token = _team.set(None)
    try:
        yield
    finally:
        _team.reset(token)


# --- how results travel -------------------------------------------------------------------------------------------


def _portable(error: Exception) -> Exception:
    """The error itself, or its words where it cannot be sent."""
    try:
        pickle.loads(
            pickle.dumps(error)
        )  # made here, one line ago: some errors cannot be made again from what they send
    except Exception:
        return SphereEditError(f"{type(error).__name__}: {error}")
    return error


class _Pickler(pickle.Pickler):
    """Tensors are sent as their own bytes, whatever they are a view of, and arrive on the device of the receiver."""

    def reducer_override(self, item: Any) -> Any:
        from torch import Tensor, uint8

        if not isinstance(item, Tensor):
            return NotImplemented
        data = item.detach().cpu().contiguous()
        return _tensor, (data.flatten().view(uint8).numpy().tobytes(), data.dtype, tuple(data.shape), item.device.type)


def _tensor(data: bytes, dtype: Any, shape: tuple[int, ...], device: str) -> Any:
    import torch

    found = torch.empty(shape, dtype=dtype)
    if data:
        found.flatten().view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return found.to(device)


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _unpacked(data: bytes) -> Any:
    """What `_packed` has sent. It comes from a process of this very run, by the group that torchrun made, and from nowhere else.

    torch.distributed unpickles what these processes send one another anyway: who can write into the group has them already.
    """
    return pickle.loads(data)
