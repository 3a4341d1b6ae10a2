"""The recipes of docs/tools.md: each section runs where its tool is installed.

`make recipes` installs the tools, and lets a missing one fail (RECIPES=all).
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from recording import SGD, batch, train_step

import sampimp
from sampimp.data import load_source

PAGE = (Path(__file__).parents[2] / "docs/tools.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TABLE, RECIPES = SNIPPETS[0], SNIPPETS[1:]


def check_parquet(names):
    pd.testing.assert_frame_equal(names["stored"], names["frame"], check_exact=True)
    assert names["stored"].attrs == names["frame"].attrs


def check_datasets(names):
    expected = names["frame"]["confidence"].nlargest(10).to_numpy()
    np.testing.assert_array_equal(names["easiest"]["confidence"], expected)


def check_cleanlab(names):
    assert len(names["suspects"]) == 20
    assert names["frame"]["label_quality"].between(0, 1).all()


def check_fiftyone(names):
    """Run the recipe in a process of its own, as FiftyOne has to be imported first."""
    code = f"import fiftyone\n{TABLE}\n{names['code']}\nprint(most.importance)\nview.delete()\n"
    settings = {"FIFTYONE_DATABASE_DIR": "db", "FIFTYONE_DATABASE_VALIDATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "FIFTYONE_DO_NOT_TRACK": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    largest = names["frame"]["importance"].iloc[:20].max()
    assert float(done.stdout.split()[-1]) == pytest.approx(largest)


def expected_means(names):
    importance = names["recorded"][-1].to_dataset()["importance"]
    return importance.mean("sample").sel(layer="0").values


def check_tensorboard(names):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs").Reload().Scalars("importance/0")
    assert [event.step for event in events] == [1, 2]
    np.testing.assert_allclose([event.value for event in events], expected_means(names), rtol=1e-6)


def check_mlflow(names):
    client = names["mlflow"].MlflowClient()
    values = client.get_metric_history(names["run"].info.run_id, "importance/0")
    np.testing.assert_allclose([v.value for v in values], expected_means(names), rtol=1e-6)


def check_wandb(names):
    assert list(Path("wandb").glob("offline-run-*/run-*.wandb"))


def check_sampler(names):
    hardest = names["frame"]["final_nll"].argmax()
    assert names["sampler"].batch_size == 50
    assert hardest in list(names["sampler"])[(1500 - 1) % 30]


CHECKS = {
    "pandas": check_parquet,
    "datasets": check_datasets,
    "cleanlab": check_cleanlab,
    "fiftyone": check_fiftyone,
    "tensorboard": check_tensorboard,
    "mlflow": check_mlflow,
    "wandb": check_wandb,
    "StrategyBatchSampler": check_sampler,
}
"""Word of a recipe by which it is found, and the check of its variables."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of the digits with one reference run, made without Ray."""
    sources = {"digits": load_source("digits")}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, hidden=(6,), batch_size=50)
    folder = oracles.start_study(tmp_path_factory.mktemp("finished"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return folder


def training():
    """Return the variables that the recipes of trackers use."""
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    recorded = []

    def train(recorder):
        for epoch in (1, 2):
            with recorder.step(range(6), epoch=epoch):
                train_step(model, recorder.optimizer, inputs, labels)
        recorder.end_epoch()
        recorded.append(recorder)

    optimizer = SGD(model.parameters(), lr=0.2)
    return {"model": model, "optimizer": optimizer, "train": train, "recorded": recorded}


def test_embedding_atlas_exports_the_samples(finished, tmp_path):
    tool = shutil.which("embedding-atlas", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("embedding-atlas not installed")
    frame = sampimp.to_frame(sampimp.open_cube(finished))
    frame.to_parquet(tmp_path / "samples.parquet")
    (command,) = re.findall("^    embedding-atlas (.*--export-application.*)$", PAGE, re.MULTILINE)
    subprocess.run([tool, *command.split()], cwd=tmp_path, check=True, capture_output=True)
    shown = pd.read_parquet(tmp_path / "atlas/data/dataset.parquet")
    for column in ("confidence", "variability"):
        np.testing.assert_array_equal(shown[column], frame[column])
    assert (tmp_path / "atlas/index.html").is_file()


def test_every_recipe_has_a_check():
    assert len(RECIPES) == len(CHECKS)


@pytest.mark.parametrize(("word", "code"), zip(CHECKS, RECIPES, strict=True), ids=list(CHECKS))
def test_a_recipe_runs(word, code, finished, tmp_path, monkeypatch):
    assert word in code
    imported = {
        node.names[0].name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    tools = {str(name).partition(".")[0] for name in imported}
    if word == "tensorboard":  # torch.utils.tensorboard imports it
        tools.add(word)
    missing = [tool for tool in tools if importlib.util.find_spec(tool) is None]
    if missing and os.environ.get("RECIPES") != "all":
        pytest.skip(f"{', '.join(missing)} not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(str(finished), "results/digits")
    names = {"__name__": "recipe", "torch": torch, "training_set": range(1500), **training()}
    exec(compile(TABLE, "docs/tools.md", "exec"), names)
    assert names["frame"].equals(sampimp.to_frame(sampimp.open_cube(finished)))
    if word == "fiftyone":
        names["code"] = code
    else:
        exec(compile(code, f"docs/tools.md, {word}", "exec"), names)
    CHECKS[word](names)
