"""What all ranks must decide alike: one word from each, the same answer on all.

A rank that acts alone on what only it has seen (a loss that is no number, a signal, a full disk) leaves its peers
waiting in a collective. So ranks vote, and then all of them act or none does.
"""

import torch
import torch.distributed as dist


class AgreedError(ValueError):
    """An error that all ranks raise together, so that one of them can say it for all."""


def highest(*votes: int) -> list[int]:
    """The largest of all ranks' votes, one by one; of flags, whether any rank has set it.

    Collective: every rank calls it with as many votes.
    """
    votes_of_all = torch.tensor(votes, dtype=torch.int32, device=_device())
    dist.all_reduce(votes_of_all, op=dist.ReduceOp.MAX)
    return [int(vote) for vote in votes_of_all.tolist()]


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """The texts of all ranks, by rank, on all of them. Collective."""
    device, ranks = _device(group), dist.get_world_size(group)
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group)
    longest = max(1, *(int(length) for length in lengths))
    padded = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(ranks)]
    dist.all_gather(padded, torch.cat([mine, mine.new_zeros(longest - len(mine))]), group)
    return [bytes(content[: int(length)].tolist()).decode() for content, length in zip(padded, lengths, strict=True)]


def first_text(text: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The text of the first rank that has one, on all ranks; None where none has. Collective."""
    return next(filter(None, gather_texts(text or "", group)), None)


def require_all(problem: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise AgreedError with ``problem`` on all ranks where any rank has one. Collective."""
    found = first_text(problem, group)
    if found is not None:
        raise AgreedError(found)


def _device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where the group's collectives take tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
