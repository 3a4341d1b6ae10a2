"""A process group whose workers train one network: each computes its share of every batch.

    each worker: gradients of its samples, of the loss that is a mean over the whole batch
    all workers: the sum of these gradients, with the same bits in every process
    each worker: the same update of its own copy of the parameters

Batches, their order and their samples are those of a single process; only the order in which
gradients are summed differs. A sum over workers is the only collective operation: per-sample values
are gathered, bit for bit, as the sum of tables that are zero at the other workers' samples.

Map: `ProcessGroup` and `SINGLE_PROCESS` (a group of one), `TorchProcessGroup` (several processes,
by torch.distributed; `open` and `join` connect them).
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

PEER_TIMEOUT = timedelta(minutes=5)
"""Longest wait of a worker for the others in a sum (arbitrary). gloo notices at once that a worker
died; NCCL notices it only by this timeout, and then ends the process."""


class ProcessGroup:
    """The workers that share each batch of a run; this class is the group of one worker.

    Examples
    --------
    >>> SINGLE_PROCESS.share(5)
    slice(0, 5, None)
    """

    rank: int = 0
    """Position of this worker in the group."""
    size: int = 1
    """Number of workers."""
    device: str | None = None
    """Device of the tensors that are summed; None for any."""

    def share(self, count: int) -> slice:
        """Return this worker's part of `count` items in order.

        The parts' sizes differ by at most one; a part is empty where there are more workers than
        items.
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all workers, with the same bits in every process."""

    def gather(self, values: Tensor, positions: slice | np.ndarray, count: int) -> Tensor:
        """Return the values of all workers' items.

        Parameters
        ----------
        values
            Shape (..., N) for N items of this worker.
        positions
            Positions of these items among all items; every item belongs to exactly one worker.
        count
            Number of all items.

        Returns
        -------
        Tensor of shape (..., count)
            On the device of `values`.
        """
        if self.size == 1:
            return values
        table = values.new_zeros((*values.shape[:-1], count), device=self.device)
        table[..., positions] = values.to(table.device)
        self.sum([table])
        return table.to(values.device)


SINGLE_PROCESS = ProcessGroup()
"""The group of one worker."""


class TorchProcessGroup(ProcessGroup):
    """Several processes, connected by torch.distributed.

    Parameters
    ----------
    group
        The process group of torch.distributed.
    store
        The rendezvous store of the workers; it must exist as long as the group.
    device
        "cpu" (gloo) or "cuda" (NCCL).
    """

    def __init__(self, group: Any, store: dist.Store, device: str) -> None:
        self.rank, self.size, self.device = group.rank(), group.size(), device
        self._group, self._store = group, store

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all workers, with the same bits in every process.

        gloo and NCCL both add up each element in one place and then distribute the sum.
        """
        for work in [self._group.allreduce([tensor]) for tensor in tensors]:
            work.wait()

    @staticmethod
    def open(host: str, size: int) -> dist.TCPStore:
        """Return the store at which `size` workers meet; it listens on `host`, at its `.port`."""
        listener = socket.create_server((host, 0))  # without it, the store listens on all addresses
        return dist.TCPStore(
            host,
            listener.getsockname()[1],
            size,
            is_master=True,
            timeout=PEER_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @classmethod
    def join(
        cls, store: dist.TCPStore | tuple[str, int], host: str, rank: int, size: int, device: str
    ) -> "TorchProcessGroup":
        """Wait until all workers have joined; return the group for worker `rank` of `size`.

        Parameters
        ----------
        store
            The meeting point: the result of `open`, or its address and port.
        host
            This machine's address, at which the other workers reach it.
        rank, size
            Position of this worker, and number of workers.
        device
            As for the class.
        """
        if isinstance(store, tuple):
            store = dist.TCPStore(*store, size, timeout=PEER_TIMEOUT, wait_for_workers=False)
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = PEER_TIMEOUT
            return cls(dist.ProcessGroupNCCL(store, rank, size, options), store, device)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = PEER_TIMEOUT
        # By default gloo takes the address that the host name resolves to, often 127.0.1.1.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return cls(dist.ProcessGroupGloo(store, rank, size, options), store, device)
