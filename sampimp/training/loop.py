"""The training loop: one network, its batches, and one record per epoch.

    theta_0 = Glorot(seed)
    for epoch t = 1, 2, ...:
        for batch in schedule(t):
            theta = theta - rate (gradient of the batch's mean loss + weight decay theta)
            importance of the batch's samples, from that very step
        NLL of every training sample and the errors, at the end of the epoch, in evaluation mode
        yield the record of epoch t

Where several workers share a run, each is in a process of its own with all of this; the update is
that of the whole batch, and every worker yields the records of all samples
(`sampimp.training.collective`).

It knows neither Ray nor Zarr: who consumes the records decides where they go, and may stop and go
on from `state` in another process, with the same bytes.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Dataset
from sampimp.errors import RecordError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.importance.recorder import ImportanceRecorder, sum_by_sample
from sampimp.schema import EpochRecord
from sampimp.training.collective import ALONE, Workers
from sampimp.training.fused import FusedStep
from sampimp.training.models import (
    build_model,
    flatten_parameters,
    parameter_layers,
)
from sampimp.training.strategies import Schedule, batch_positions

EVALUATION_CHUNK = 1000
"""Samples evaluated at once; larger ones were no faster on a CPU (0.9 to 1.1 s for 50,000)."""


class Step(Protocol):
    """One training step, which may leave importance behind."""

    def __call__(self, inputs: Tensor, labels: Tensor, batch_size: int) -> None:
        """Train on one batch, or on this worker's share of a batch of `batch_size`."""

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""


class AutogradStep:
    """Train any network by an optimizer on the mean cross-entropy, and record.

    The softmax is in float64, for the reason given in `sampimp.training.fused.loss_gradient`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: bool) -> None:
        self._model, self._optimizer = model, optimizer
        self._recorder = ImportanceRecorder(model, optimizer) if record else None
        self._count = 0  # samples since the last take

    def __call__(self, inputs: Tensor, labels: Tensor, batch_size: int) -> None:
        """Train on one batch: inputs [N, ...], labels [N]."""
        index = np.arange(self._count, self._count + len(labels))
        self._count += len(labels)
        recording = self._recorder.step(index, epoch=0) if self._recorder else nullcontext()
        with recording:
            self._optimizer.zero_grad()
            functional.cross_entropy(self._model(inputs).double(), labels).backward()
            self._optimizer.step()

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""
        count, self._count = self._count, 0
        return self._recorder.pop_epoch(0, count) if self._recorder else None


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration over all parameters of a model.

    In its fused form, which is one pass over the memory: of the paper's network under AdamW it took
    0.5 ms where the for-loop took 2.2.
    """
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "momentum": partial(torch.optim.SGD, momentum=0.9),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return makers[training.optimizer](
        model.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True,
    )


class TrainingRun:
    """One trial's network on its way through the epochs.

    Parameters
    ----------
    config
        What decides the numbers.
    data
        The arrays that are trained on.
    schedule
        The batches of each epoch.
    record
        False trains the very same parameters without measuring importance.
    workers
        Who else computes a share of each batch.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: Dataset,
        schedule: Schedule,
        *,
        record: bool = True,
        workers: Workers = ALONE,
    ) -> None:
        training = config.training
        self.config, self.schedule, self.workers = config, schedule, workers
        self.epoch = 0
        device = torch.device(training.device)
        if device.type == "cuda":
            use_deterministic_algorithms()
        self._train = tuple(torch.from_numpy(a).to(device) for a in data[:2])
        self._test = tuple(torch.from_numpy(a).to(device) for a in data[2:])
        class_count = int(max(data.train_labels.max(), data.test_labels.max())) + 1
        self.model = build_model(
            training.model, data.train_inputs.shape[1:], training.hidden, class_count, config.seed
        ).to(self._train[0])  # its precision as well
        self.optimizer = make_optimizer(self.model, training)
        self.step: Step
        if training.model == "mlp":
            assert isinstance(self.model, nn.Sequential)
            self.step = FusedStep(self.model, self.optimizer, record=record, workers=workers)
        else:
            self.step = AutogradStep(self.model, self.optimizer, record)

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Layer and size of every tensor of the model's parameters, in order."""
        return parameter_layers(self.model)

    def records(self) -> Iterator[EpochRecord]:
        """Yield the records that are still to come; the last one early if the run diverges.

        Yields
        ------
        EpochRecord
            At the start of a new run, epoch 0 with the initial parameters; then one an epoch.
        """
        torch.set_num_threads(self.config.training.threads)
        states = set(self.config.training.stored_states())
        if self.epoch == 0:
            yield EpochRecord(epoch=0, arrays=self._parameters() if 0 in states else {})
        while self.epoch < self.config.training.epochs:
            start = time.perf_counter()
            self.epoch += 1
            arrays = self._train_epoch()
            arrays |= self._evaluate()
            seconds = time.perf_counter() - start
            if self.epoch in states:
                arrays |= self._parameters()
            measured = (arrays["train_nll"], arrays.get("importance", 0.0))
            diverged = not all(np.isfinite(values).all() for values in measured)
            yield EpochRecord(epoch=self.epoch, arrays=arrays, diverged=diverged, seconds=seconds)
            if diverged:
                return

    def _train_epoch(self) -> dict[str, np.ndarray]:
        inputs, labels = self._train
        batches = self.schedule(self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.training.rate(self.epoch)
        torch.manual_seed(hash((self.config.seed, self.epoch)))  # of dropout, where there is any
        own: list[np.ndarray] = []  # this worker's samples, by their place in the epoch
        start = 0
        for batch in batches:
            share = self.workers.share(len(batch))
            index = torch.from_numpy(batch[share])
            self.step(inputs[index], labels[index], len(batch))
            own.append(np.arange(start, start + len(batch))[share])
            start += len(batch)
        arrays = {"batch": batch_positions(batches, len(labels))}
        beta_LN = self.step.take()
        if beta_LN is not None:
            beta_LN = self.workers.gather(beta_LN, np.concatenate(own), start)
            index = torch.from_numpy(np.concatenate(batches))
            arrays["importance"] = sum_by_sample(index, beta_LN, len(labels)).float().numpy()
        return arrays

    def _evaluate(self) -> dict[str, np.ndarray]:
        train_nll, train_error = evaluate(self.model, *self._train, workers=self.workers)
        test_nll, test_error = evaluate(self.model, *self._test, workers=self.workers)
        return {
            "nll": train_nll.astype(np.float32),
            "train_nll": train_nll.mean(),
            "train_error": np.float64(train_error),
            "test_nll": test_nll.mean(),
            "test_error": np.float64(test_error),
        }

    def _parameters(self) -> dict[str, np.ndarray]:
        return {"parameters": flatten_parameters(self.model).float().cpu().numpy()}

    def state(self) -> bytes:
        """Return all that is needed to go on after this epoch."""
        buffer = io.BytesIO()
        torch.save(
            {
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, state: bytes, epoch: int) -> None:
        """Go on from `state`; raise RecordError unless it is that of the epoch asked for."""
        restored = torch.load(
            io.BytesIO(state), weights_only=True, map_location=self.config.training.device
        )
        if restored["epoch"] != epoch:
            raise RecordError(
                expected=f"the state after epoch {epoch}",
                got=f"that after epoch {restored['epoch']}",
                where=f"checkpoint of {self.config.strategy}, seed {self.config.seed}",
                todo="delete this checkpoint; the one before is used",
            )
        self.model.load_state_dict(restored["model"])
        self.optimizer.load_state_dict(restored["optimizer"])
        self.epoch = epoch


def use_deterministic_algorithms() -> None:
    """Let this process compute the same bytes on the same GPU each time.

    The cost has not been measured. cuBLAS reads its variable when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@torch.inference_mode()
def evaluate(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, workers: Workers = ALONE
) -> tuple[np.ndarray, float]:
    """Return the NLL of every sample, shape (N,) in nats, and the fraction misclassified.

    The model is in evaluation mode meanwhile: nothing is dropped, and a BatchNorm uses the
    statistics that it has and does not add to them. Each worker evaluates its share, and has the
    result of all. The logarithm of the softmax is taken in float64: in float32 a confident sample's
    NLL is a multiple of 6e-8 and often 0, and the strategies sort by it.
    """
    nll, wrong = [], torch.zeros((), dtype=torch.int64, device=labels.device)
    own = workers.share(len(labels))
    with evaluation_mode(model):
        for inputs_N, labels_N in zip(
            inputs[own].split(EVALUATION_CHUNK), labels[own].split(EVALUATION_CHUNK), strict=True
        ):
            logits = model(inputs_N).double()
            nll.append(functional.cross_entropy(logits, labels_N, reduction="none"))
            wrong += (logits.argmax(1) != labels_N).sum()
    workers.sum([wrong])
    return workers.gather(torch.cat(nll), own, len(labels)).cpu().numpy(), int(wrong) / len(labels)
