"""Workers that train one network together: each computes its share of every batch.

    each worker: the gradients of its samples, of the loss that is a mean over the whole batch
    all of them: the sum of these gradients, the same bits everywhere
    each worker: the same update of its own copy of the parameters

The batches, their order and their samples stay those of one worker; what changes is the order in
which gradients are summed. Nothing needs more than a sum over the workers: what each of them
measured of its own samples is gathered as the sum of tables that are zero elsewhere, to the bit.

Map: `Workers` and `ALONE` (one worker, which has nobody to add to), `TorchWorkers` (several
processes, by torch.distributed), `TorchWorkers.lead` and `TorchWorkers.join` (how they meet).
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)
"""How long one worker waits for another in a sum (arbitrary). gloo notices one that died at once;
NCCL only so, and then ends the process."""


class Workers:
    """The one worker of a run; a subclass has others beside it.

    Examples
    --------
    >>> ALONE.share(5)
    slice(0, 5, None)
    """

    rank: int = 0
    """Position of this worker among them."""
    size: int = 1
    """Number of workers."""
    device: str | None = None
    """Where tensors that are summed must be; None for anywhere."""

    def share(self, count: int) -> slice:
        """Return which of so many items, in their order, are this worker's; it may be none.

        Sizes differ by at most one.
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor its sum over all workers, the same bits on each of them."""

    def gather(self, values: Tensor, own: slice | np.ndarray, count: int) -> Tensor:
        """Return the values of all workers' items.

        Parameters
        ----------
        values
            Shape (..., N) for N items of this worker.
        own
            Their positions among all items, of which each is one worker's.
        count
            Number of all items.

        Returns
        -------
        Tensor of shape (..., count)
            On the device of the values.
        """
        if self.size == 1:
            return values
        table = values.new_zeros((*values.shape[:-1], count), device=self.device)
        table[..., own] = values.to(table.device)
        self.sum([table])
        return table.to(values.device)


ALONE = Workers()
"""No other worker."""


class TorchWorkers(Workers):
    """One of several processes that are connected by torch.distributed.

    Parameters
    ----------
    group
        Their process group, made by `lead` and `join`.
    store
        What they met at; it is kept as long as they are.
    device
        "cpu" (gloo) or "cuda" (NCCL).
    """

    def __init__(self, group: Any, store: dist.Store, device: str) -> None:
        self.rank, self.size, self.device = group.rank(), group.size(), device
        self._group, self._store = group, store

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor its sum over all workers, the same bits on each of them.

        Both gloo and NCCL add up each element at one place and then send the sum around.
        """
        for work in [self._group.allreduce([tensor]) for tensor in tensors]:
            work.wait()

    @staticmethod
    def open(host: str, size: int) -> dist.TCPStore:
        """Return where so many workers meet: a store that listens on one address, at `.port`."""
        listener = socket.create_server((host, 0))  # without it, the store listens on all addresses
        return dist.TCPStore(
            host,
            listener.getsockname()[1],
            size,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @classmethod
    def join(
        cls, store: dist.TCPStore | tuple[str, int], host: str, rank: int, size: int, device: str
    ) -> "TorchWorkers":
        """Return worker `rank` of `size` once all of them have met.

        Parameters
        ----------
        store
            Where they meet: what `open` returned, or its address and port.
        host
            This machine's address, at which the others reach it.
        rank, size
            Of this worker, and of all.
        device
            As for the class.
        """
        if isinstance(store, tuple):
            store = dist.TCPStore(*store, size, timeout=TIMEOUT, wait_for_workers=False)
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            return cls(dist.ProcessGroupNCCL(store, rank, size, options), store, device)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = TIMEOUT
        # By default gloo takes the address that the host's name stands for, often 127.0.1.1.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return cls(dist.ProcessGroupGloo(store, rank, size, options), store, device)
