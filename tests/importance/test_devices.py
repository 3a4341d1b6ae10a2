"""Recorded steps do not wait for an accelerator.

The tests run on the meta device, where a tensor has no values, so reading one is an error.
"""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sampimp.config import MODELS
from sampimp.importance.gradient_checks import GradientChecks
from sampimp.importance.known_layouts import KnownLayouts
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.fused import FusedStep
from sampimp.training.models import build_model

SHAPE, SIZE = (1, 8, 8), 4
OPTIMIZERS = pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__
)


class Transfers(TorchDispatchMode):
    """Collects the operations that copy values from one device to another.

    Reading a value, as `item()` does, raises an error on the meta device by itself.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [
            tensor
            for tensor in (*args, result)
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.numel()
        ]
        if len({tensor.device for tensor in tensors}) > 1:
            self.operations.append(str(function))
        return result


def make(name, kind, device="meta", **options):
    model = build_model(name, SHAPE, (6, 5), 3, seed=1).to(device)
    inputs = torch.randn(SIZE, *SHAPE).to(device)
    labels = torch.zeros(SIZE, dtype=torch.long, device=device)
    return model, kind(model.parameters(), lr=0.1, **options), inputs, labels


@OPTIMIZERS
@pytest.mark.parametrize("name", MODELS)
def test_recording_reads_nothing_from_the_device_before_the_epochs_end(name, kind, monkeypatch):
    # The proof in an epoch's first step reads values. It runs on the CPU here, and its result is
    # used for the meta device.
    layouts = []
    find = KnownLayouts.find

    def note(self, *args):
        layouts.append(find(self, *args))
        return layouts[-1]

    monkeypatch.setattr(KnownLayouts, "find", note)
    model, optimizer, inputs, labels = make(name, kind, "cpu")
    with ImportanceRecorder(model, optimizer).step(range(SIZE), epoch=1):
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    monkeypatch.setattr(KnownLayouts, "find", lambda *_: layouts[0])
    monkeypatch.setattr(GradientChecks, "_compare", lambda *_: None)
    model, optimizer, inputs, labels = make(name, kind)
    recorder = ImportanceRecorder(model, optimizer)
    with Transfers() as transfers:
        for step in range(3):
            index = range(SIZE * step, SIZE * (step + 1))
            with recorder.step(index, epoch=1):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    assert transfers.operations == []
    with pytest.raises(NotImplementedError, match="meta"):  # importance leaves the device only here
        recorder.pop_epoch(1, 3 * SIZE)


@OPTIMIZERS
def test_the_written_out_step_reads_nothing_from_the_device_before_the_epochs_end(kind):
    model, optimizer, inputs, labels = make("mlp", kind)
    step = FusedStep(model, optimizer, record=True)
    with Transfers() as transfers:
        for _ in range(3):
            step(inputs, labels)
    assert transfers.operations == []
    with pytest.raises(NotImplementedError, match="meta"):
        step.take()


def test_reading_a_value_on_the_meta_device_is_an_error():
    values = torch.ones(3, device="meta")
    for read in (lambda: values.sum().item(), lambda: bool(values.any()), values.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with Transfers() as transfers:
        torch.arange(3).to("meta")
    assert len(transfers.operations) == 1
