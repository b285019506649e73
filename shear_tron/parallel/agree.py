"""What all ranks must decide alike: one word from each, the same answer on all.

A rank that acts alone on what only it has seen (a loss that is no number, a signal, a full disk) leaves its peers
waiting in a collective. So ranks vote, and then all of them act or none does.
"""

import torch
import torch.distributed as dist


class AgreedError(ValueError):
    """An error that all ranks raise together, so that one of them can say it for all."""


def any_rank(*flags: bool) -> list[bool]:
    """For each flag whether any rank has set it. Collective: every rank calls it with as many flags."""
    votes = torch.tensor(flags, dtype=torch.int32, device=_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def first_text(text: str | None) -> str | None:
    """The text of the first rank that has one, on all ranks; None where none has. Collective."""
    ranks = dist.get_world_size()
    speaker = torch.tensor(ranks if text is None else dist.get_rank(), device=_device())
    dist.all_reduce(speaker, op=dist.ReduceOp.MIN)
    if speaker.item() == ranks:
        return None
    mine = (text or "").encode() if int(speaker) == dist.get_rank() else b""
    length = torch.tensor(len(mine), device=_device())
    dist.broadcast(length, src=int(speaker))
    content = torch.zeros(int(length), dtype=torch.uint8, device=_device())
    if mine:
        content.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    dist.broadcast(content, src=int(speaker))
    return bytes(content.tolist()).decode()


def require_all(problem: str | None) -> None:
    """Raise AgreedError with ``problem`` on all ranks where any rank has one. Collective."""
    found = first_text(problem)
    if found is not None:
        raise AgreedError(found)


def _device() -> torch.device:
    """Where the process group's collectives take tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
