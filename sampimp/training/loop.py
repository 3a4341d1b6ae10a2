"""The training loop: one network, its batches, and one record per epoch.

    theta_0 = Glorot(seed)
    for epoch t = 1, 2, ...:
        for batch in schedule(t):
            theta = theta - rate (gradient of the batch's mean loss + weight decay theta)
            importance of the batch's samples, measured in this step
        NLL of every training sample and the errors, at the end of the epoch, in evaluation mode
        yield the record of epoch t

If several workers share a run, each process executes this loop; the update is that of the whole
batch, and every worker yields the records of all samples (`sampimp.training.collective`).

The loop imports neither Ray nor Zarr. The caller stores the records; it may stop, and continue
from `TrainingRun.state` in another process with the same bytes.

A run can be trained again, step by step or whole: with other weights of its samples, without some
of them, from a start that is moved a little, or without evaluation.

Map: `TrainingRun` (`records` is the loop; `begin_epoch` and `train_batch` are its parts),
`evaluate` (NLL and errors), `use_deterministic_algorithms`.
"""

import io
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sampimp.config import TrialConfig
from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.importance.sample_index import sum_by_sample
from sampimp.schema import EpochRecord
from sampimp.training.checkpoint_states import load_tensors, restoring, unusable
from sampimp.training.collective import SINGLE_PROCESS, ProcessGroup
from sampimp.training.fused import FusedStep
from sampimp.training.models import (
    build_model,
    flatten_parameters,
    jitter_parameters,
    parameter_layers,
)
from sampimp.training.steps import AutogradStep, TrainingStep, make_optimizer
from sampimp.training.strategies import Schedule, batch_positions

EVALUATION_CHUNK = 1000
"""Samples evaluated at once; larger chunks were no faster on a CPU (0.9 to 1.1 s for 50,000)."""


class TrainingRun:
    """One trial's network during its training.

    Parameters
    ----------
    config
        Configuration of the trial, which determines its numbers.
    data
        The arrays to train on.
    schedule
        The batches of each epoch.
    record
        False trains exactly the same parameters without measuring importance.
    process_group
        The workers that share each batch.
    weights
        Shape (N,): weights of the samples' losses; 0 removes a sample. The batches, and the
        denominator of each batch's mean, remain. If all weights are 1, the parameters are equal bit
        for bit to those of a run without weights.
    renormalised
        Divide the loss of each batch by the sum of its weights instead.
    jitter
        Size and seed of a normal number that is added to every initial parameter.

    Raises
    ------
    ConfigError
        Weights of another shape, or not finite; weights in a run that records, or has several
        workers.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: Dataset,
        schedule: Schedule,
        *,
        record: bool = True,
        process_group: ProcessGroup = SINGLE_PROCESS,
        weights: np.ndarray | None = None,
        renormalised: bool = False,
        jitter: tuple[float, int] | None = None,
    ) -> None:
        training = config.training
        self.config, self.schedule, self.process_group = config, schedule, process_group
        self.epoch = 0
        device = torch.device(training.device)
        if device.type == "cuda":
            use_deterministic_algorithms()
        self._train = tuple(torch.from_numpy(array).to(device) for array in data[:2])
        self._test = tuple(torch.from_numpy(array).to(device) for array in data[2:])
        class_count = int(max(data.train_labels.max(), data.test_labels.max())) + 1
        self.model = build_model(
            training.model,
            data.train_inputs.shape[1:],
            training.hidden,
            class_count,
            config.seed,
            training.activation,
        ).to(self._train[0])  # device and precision of the inputs
        if jitter is not None:
            jitter_parameters(self.model, *jitter)
        if weights is not None:
            _check_weights(weights, config, len(data.train_labels), record)
        self._weights, self._renormalised = weights, renormalised
        self.optimizer = make_optimizer(self.model, training)
        self.step: TrainingStep
        if training.model == "mlp":
            assert isinstance(self.model, nn.Sequential)
            self.step = FusedStep(
                self.model, self.optimizer, record=record, process_group=process_group
            )
        else:
            self.step = AutogradStep(self.model, self.optimizer, record)

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Layer and size of every tensor of the model's parameters, in order."""
        return parameter_layers(self.model)

    def records(self) -> Iterator[EpochRecord]:
        """Train, and yield one record per remaining epoch; stop after an epoch that diverges.

        Yields
        ------
        EpochRecord
            One per epoch; a new run first yields epoch 0, with the initial parameters.
        """
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

    def begin_epoch(self, epoch: int) -> list[np.ndarray]:
        """Set the learning rate and the random state of an epoch (1-based); return its batches.

        `train_batch` with each of them, from the parameters and the optimizer's state before the
        epoch, trains the epoch bit for bit as `records` does.
        """
        torch.set_num_threads(self.config.training.threads)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = self.config.training.rate(epoch)
        torch.manual_seed(hash((self.config.seed, epoch)))  # for dropout
        return self.schedule(epoch)

    def train_batch(self, batch: np.ndarray) -> None:
        """Take the training step of a batch: the indices of its samples, of all workers."""
        index = batch[self.process_group.share(len(batch))]
        inputs, labels = self.batch_data(index)
        if self._weights is None or (self._weights[batch] == 1).all():
            self.step(inputs, labels, len(batch))
            return
        weights = torch.from_numpy(self._weights[batch]).to(inputs)
        # Without any sample the loss is 0, by any denominator.
        denominator = (float(weights.sum()) or 1.0) if self._renormalised else len(batch)
        self.step(inputs, labels, denominator, weights)

    def batch_data(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, ...) and labels (N,) of training samples."""
        inputs, labels = self._train
        rows = torch.from_numpy(index)
        return inputs[rows], labels[rows]

    def _train_epoch(self) -> dict[str, np.ndarray]:
        batches, sample_count = self.begin_epoch(self.epoch), len(self._train[1])
        positions: list[np.ndarray] = []  # of this worker's samples, in the epoch's order
        start = 0
        for batch in batches:
            self.train_batch(batch)
            share = self.process_group.share(len(batch))
            positions.append(np.arange(start, start + len(batch))[share])
            start += len(batch)
        arrays = {"batch": batch_positions(batches, sample_count)}
        beta_LN = self.step.take()
        if beta_LN is not None:
            beta_LN = self.process_group.gather(beta_LN, np.concatenate(positions), start)
            index = torch.from_numpy(np.concatenate(batches))
            arrays["importance"] = sum_by_sample(index, beta_LN, sample_count).float().numpy()
        return arrays

    def _evaluate(self) -> dict[str, np.ndarray]:
        group = self.process_group
        train_nll, train_error = evaluate(self.model, *self._train, process_group=group)
        test_nll, test_error = evaluate(self.model, *self._test, process_group=group)
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
        """Return the state after this epoch, from which `restore` continues."""
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
        """Continue from the state after `epoch`.

        Raises
        ------
        UnusableCheckpointError
            The state is that of another epoch or network, or none.
        """
        what = f"{self.config.strategy}, seed {self.config.seed}, after epoch {epoch}"
        with restoring(what):
            restored = load_tensors(state, self.config.training.device)
            if restored["epoch"] != epoch:
                raise unusable(what, f"the state after epoch {restored['epoch']}")
            self.model.load_state_dict(restored["model"])
            self._restore_optimizer(restored["optimizer"])
        self.epoch = epoch

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Load an optimizer's state, or raise ValueError for one with other settings or shapes."""
        settings = [
            [{**group, "lr": None} for group in groups["param_groups"]]
            for groups in (state, self.optimizer.state_dict())
        ]
        if settings[0] != settings[1]:
            raise ValueError("other settings of the optimizer")
        self.optimizer.load_state_dict(state)
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if value.shape not in (parameter.shape, ()):
                    raise ValueError(f"{name} of shape {list(value.shape)} in the optimizer")


def _check_weights(
    weights: np.ndarray, config: TrialConfig, sample_count: int, record: bool
) -> None:
    """Raise ConfigError for weights that a run cannot train with."""
    wrong = {
        f"weights of shape {weights.shape}": weights.shape != (sample_count,),
        "weights that are not finite": not np.isfinite(weights).all(),
        f"{config.training.workers} workers": config.training.workers > 1,
        "a run that records importance": record,
    }
    if any(wrong.values()):
        raise ConfigError(
            expected=f"{sample_count} finite weights, for one worker without recording",
            got=", ".join(words for words, holds in wrong.items() if holds),
            where=f"run of {config.strategy}, seed {config.seed}, with weighted samples",
            todo="train it with record=False and workers=1, and a weight for each sample",
        )


def use_deterministic_algorithms() -> None:
    """Make the results of this process on one GPU reproducible bit for bit.

    The cost has not been measured. cuBLAS reads its environment variable at its first use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[np.ndarray, float]:
    """Return the NLL of every sample, shape (N,) in nats, and the fraction misclassified.

    The model is evaluated in evaluation mode: dropout is off, and a BatchNorm uses its stored
    statistics without updating them. Each worker evaluates its share and returns the result of all
    samples. The log-softmax is computed in float64: in float32 the NLL of a confident sample is a
    multiple of 6e-8 and often 0, and the strategies sort by it.
    """
    nll, wrong = [], torch.zeros((), dtype=torch.int64, device=labels.device)
    share = process_group.share(len(labels))
    chunks = (values[share].split(EVALUATION_CHUNK) for values in (inputs, labels))
    with evaluation_mode(model):
        for inputs_N, labels_N in zip(*chunks, strict=True):
            logits = model(inputs_N).double()
            nll.append(functional.cross_entropy(logits, labels_N, reduction="none"))
            wrong += (logits.argmax(1) != labels_N).sum()
    process_group.sum([wrong])
    nll_N = process_group.gather(torch.cat(nll), share, len(labels))
    return nll_N.cpu().numpy(), int(wrong) / len(labels)
