"""Snapshot importance: every sample at the fixed, stored parameters of an epoch."""

import io
import shutil
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import ray.data
import torch
from rich.console import Console

import sampimp
from sampimp.data import load_source
from sampimp.errors import ConfigError
from sampimp.store.location import Folder
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import seal
from sampimp.store.snapshots import SNAPSHOTS
from sampimp.sweeps import score_snapshots as command
from sampimp.sweeps import status
from sampimp.sweeps.options import parse
from sampimp.sweeps.scoring import _require_constant_buffers, check_epochs, score_snapshots
from sampimp.sweeps.study import make_plan
from sampimp.training.models import build_model

SAMPLES = (0, 1, 733, 1499)


@pytest.fixture(scope="module")
def scored(finished, cluster, tmp_path_factory):
    """A copy of the finished study with snapshots of epoch 2: five trials, one epoch each."""
    out = tmp_path_factory.mktemp("scored") / "study"
    shutil.copytree(finished.out, out)
    console = Console(file=StringIO(), width=80)
    assert score_snapshots(str(out), 2, console) == 5
    assert "Scoring snapshots" in console.file.getvalue()
    assert "5/5" in console.file.getvalue()
    return out


def single_sample_importance(cube, parameters_P, index):
    """Return (eta/B)^2 |g|^2 of one sample by layer, by autograd in float64."""
    data = sampimp.load_dataset("digits")
    layers = cube.layer_of_parameter.values
    tensors, position = [], 0
    for fan_in, fan_out in ((64, 16), (16, 10)):
        for shape in ((fan_out, fan_in), (fan_out,)):
            count = int(np.prod(shape))
            values = torch.from_numpy(parameters_P[position : position + count].astype(np.float64))
            tensors.append(values.reshape(shape).requires_grad_())
            position += count
    assert position == len(parameters_P) == len(layers)
    inputs = torch.from_numpy(data.train_inputs[index].reshape(1, -1).astype(np.float64))
    hidden = torch.relu(inputs @ tensors[0].T + tensors[1])
    logits = hidden @ tensors[2].T + tensors[3]
    label = torch.tensor([data.train_labels[index]])
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label), tensors)
    squares = [float((0.1 / 25 * gradient).square().sum()) for gradient in gradients]
    return [squares[0] + squares[1], squares[2] + squares[3]]


def test_values_are_those_of_single_samples(scored):
    cube = sampimp.open_cube(scored)["digits"]
    attrs = cube.snapshot_importance.attrs
    assert (attrs["learning_rate"], attrs["batch_size"], attrs["loss_reduction"]) == (
        *(0.1, 25),
        "mean",
    )
    for strategy, seed in (("shuffle", 1), ("nlo", 2), ("rand", 1)):
        trial = cube.sel(strategy=strategy, seed=seed)
        parameters_P = trial.parameters.sel(state=2).values
        for index in SAMPLES:
            expected = single_sample_importance(cube, parameters_P, index)
            got = trial.snapshot_importance.sel(epoch=2, sample=index).values
            np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_it_is_not_the_in_step_importance(scored):
    trial = sampimp.open_cube(scored)["digits"].sel(strategy="shuffle", seed=1, epoch=2)
    assert not np.allclose(trial.snapshot_importance, trial.importance, rtol=0.1)


def test_epochs_without_a_snapshot_are_nan(scored):
    snapshots = sampimp.open_cube(scored)["digits"].snapshot_importance
    assert snapshots.dims == ("strategy", "seed", "epoch", "layer", "sample")
    there = ~np.isnan(snapshots).all(["layer", "sample"]).sel(epoch=2)
    assert there.values.tolist() == [[True, False], [True, True], [True, True]]
    assert np.isnan(snapshots.sel(epoch=[1, 3])).all()
    assert not np.isnan(snapshots.sel(strategy="rand", epoch=2)).any()


def test_a_snapshot_is_not_computed_twice(scored):
    def writes():
        return {
            path: path.stat().st_mtime_ns
            for path in scored.rglob("*")
            if path.is_file() and "snapshot_importance" in path.parts
        }

    before = writes()
    assert before
    assert score_snapshots(str(scored), 2, Console(file=StringIO())) == 0
    assert writes() == before


def test_a_study_scores_with_its_own_option(finished, run_study, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(finished.out, out)
    code, _ = run_study(out, *finished.arguments, "--snapshot-every", "3")
    assert code == 0
    scored_epochs = Folder.of(out).read_json(SNAPSHOTS)
    assert len(scored_epochs) == 5
    assert set(map(tuple, scored_epochs.values())) == {("3",)}


def test_the_command_computes_the_missing_epochs(scored, cluster, monkeypatch, capfd, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(scored, out)
    monkeypatch.setattr("sampimp.sweeps.cluster.connect", lambda address: cluster)
    assert command.main([str(out), "--every", "1"]) == 0
    text, errors = capfd.readouterr()
    assert text.startswith("Ray of the tests: 1 node, 2 CPUs, 0 GPUs.\n")
    assert text.splitlines()[-1] == "10 epochs scored; the others were there already."
    assert errors == ""
    snapshots = sampimp.open_cube(out)["digits"].snapshot_importance
    assert not np.isnan(snapshots.sel(strategy="nlo")).any()
    # Epoch 2 is unchanged.
    before = sampimp.open_cube(scored)["digits"].snapshot_importance.sel(epoch=2)
    np.testing.assert_array_equal(snapshots.sel(epoch=2), before)


def test_what_another_process_lists_meanwhile_is_kept(scored, monkeypatch, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(scored, out)
    listed = Folder.of(out).read_json(SNAPSHOTS)
    Folder.of(out).delete(SNAPSHOTS)
    from_items = ray.data.from_items

    def list_and_go_on(*items, **options):
        Folder.of(out).write_json(SNAPSHOTS, listed)
        return from_items(*items, **options)

    monkeypatch.setattr(ray.data, "from_items", list_and_go_on)
    assert score_snapshots(str(out), 3, Console(file=StringIO())) == 5
    after = Folder.of(out).read_json(SNAPSHOTS)
    assert {name: set(epochs) for name, epochs in after.items()} == {
        name: {"2", "3"} for name in listed
    }
    assert all(after[name]["2"] == listed[name]["2"] for name in listed)


def test_the_command_prints_what_is_wrong(scored, cluster, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sampimp.sweeps.cluster.connect", lambda address: cluster)
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "a study, with a study.json"),
        ([str(scored), "--every", "0"], "from 1 to 3"),
        ([str(scored), "--every", "4"], "from 1 to 3"),
    ):
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert not (tmp_path / "nowhere").exists()


def test_a_network_is_imported_only_if_the_user_names_it(
    scored, cluster, monkeypatch, capsys, tmp_path
):
    """The store comes from another person; importing its module writes a file."""
    out, trace = tmp_path / "study", tmp_path / "imported"
    shutil.copytree(scored, out)
    (tmp_path / "foreign.py").write_text(
        f"import pathlib\n\npathlib.Path({str(trace)!r}).touch()\n\n\n"
        "def make(*arguments):\n    return 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sampimp.sweeps.cluster.connect", lambda address: cluster)
    plan = require_plan(Folder.of(out))
    foreign = replace(plan, training=replace(plan.training, model="foreign:make"))
    for name in ("plans/0001.json", "study.json"):
        (out / name).write_bytes(seal(foreign.to_json()))

    sampimp.open_cube(out)
    assert status.main([str(out), "--verify"]) == 0
    capsys.readouterr()
    for named, words in (
        ((), "Expected option --model foreign:make\n     Got none"),
        (("--model", "cnn"), "Expected option --model foreign:make\n     Got --model cnn"),
        (
            ("--model", "foreign:make"),
            "which recorded the name only",
        ),  # the study was not trained with this network
    ):
        assert command.main([str(out), "--every", "1", *named]) == 2
        assert words in capsys.readouterr().err
    assert not trace.exists()
    with pytest.raises(ConfigError, match="function that returns int"):
        build_model("foreign:make", (1, 8, 8), (), 10, seed=0)
    assert trace.exists()


def test_buffers_that_training_has_changed_are_refused(tmp_path):
    trial = Folder.of(tmp_path)
    model = torch.nn.BatchNorm1d(2)
    for number, mean in enumerate((0.0, 0.5), start=1):
        _require_constant_buffers(model, trial)
        state = io.BytesIO()
        trained = torch.nn.BatchNorm1d(2)
        trained.running_mean.fill_(mean)
        torch.save({"model": trained.state_dict()}, state)
        trial.write_bytes(
            f"checkpoints/epoch-00000{number}-attempt-0001/state.pt", state.getvalue()
        )
    with pytest.raises(ConfigError, match="changed buffers: running_mean"):
        _require_constant_buffers(model, trial)
    _require_constant_buffers(torch.nn.Linear(2, 2), trial)


@pytest.mark.parametrize(("stored", "every"), [(0, 5), (2, 5), (2, 1)])
def test_parameters_that_are_not_stored(stored, every):
    config = parse(["--preset", "digits", "--epochs", "12", "--parameters-every", str(stored)])
    plan = make_plan(config, {"digits": load_source("digits")})
    with pytest.raises(ConfigError, match="no parameters of epoch") as caught:
        check_epochs(plan, every)
    message = str(caught.value)
    assert "option --every" in message
    assert f"every {stored} epochs" in message or (stored == 0 and "none are stored" in message)
    if stored:
        assert check_epochs(plan, 2 * stored) == [4, 8, 12]
