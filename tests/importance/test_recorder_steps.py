"""What `ImportanceRecorder(keep_steps=True)` keeps of each step."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp import ImportanceRecorder


def train(model, optimizer, recorder, batches, *, clip=None, epoch=1):
    inputs, labels = torch.randn(12, 4), torch.randint(0, 3, (12,))
    for passes in batches:
        with recorder.step(passes if len(passes) > 1 else passes[0], epoch=epoch):
            optimizer.zero_grad()
            for index in passes:
                functional.cross_entropy(model(inputs[index]), labels[index]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5  # as a scheduler inside the block does


def test_steps_hold_samples_settings_and_random_state():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = ImportanceRecorder(model, optimizer, keep_steps=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(model, optimizer, recorder, [[torch.tensor([3, 1])]], epoch=1)
    train(model, optimizer, recorder, [[torch.tensor([0, 2]), torch.tensor([5])]], epoch=2)
    first, second = recorder.steps
    assert (first.epoch, second.epoch) == (1, 2)
    np.testing.assert_array_equal(first.index, [3, 1])
    assert [index.tolist() for index in second.passes] == [[0, 2], [5]]
    assert first.groups[0]["lr"] == 0.1
    assert second.groups[0]["lr"] == 0.05
    assert "params" not in first.groups[0]
    assert not first.is_scaled
    torch.manual_seed(7)
    torch.randn(12, 4), torch.randint(0, 3, (12,))
    assert torch.equal(first.random_state.cpu, torch.get_rng_state())
    assert not torch.equal(first.random_state.cpu, before)


@pytest.mark.parametrize(("clip", "is_scaled"), [(1e-3, True), (1e3, False)])
def test_clipping_is_noticed_and_no_random_state_is_kept_without_need(clip, is_scaled):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer, keep_steps=True)
    train(model, optimizer, recorder, [[torch.tensor([3, 1])]], clip=clip)
    assert recorder.steps[0].is_scaled == is_scaled
    assert recorder.steps[0].random_state is None


def test_steps_are_not_kept_by_default():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer)
    train(model, optimizer, recorder, [[torch.tensor([3, 1])]])
    assert recorder.steps == []
