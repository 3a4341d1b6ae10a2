"""Snippets of the pages: Python code is run, commands are parsed by the program that they call.

A page with Python code needs an entry in `PYTHON`, and a command a program in `PROGRAMS`; a snippet
without them fails. `test_a_cheap_command_is_run` also runs some commands on a small study.

Map: pages and their snippets, preparations and checks of Python code, parsers of commands, tests.
"""

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
import tyro
import xarray as xr
import yaml
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sampimp
from sampimp.analysis import report
from sampimp.analysis.explorer import explore
from sampimp.data import load_source
from sampimp.store.location import Folder
from sampimp.sweeps import (
    command,
    consolidate,
    influence,
    options,
    retrain,
    score_snapshots,
    status,
    subset,
)
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/_build", "docs/gallery", "docs/api")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    if not path.relative_to(ROOT).as_posix().startswith(GENERATED)
}
FENCE = re.compile(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAMPLES = 20


# Python code


class Page(NamedTuple):
    """Preparation of the code of a page, and checks of its variables."""

    names: Callable[[Path], dict[str, Any]]
    """Make the variables that the code uses; argument: a finished study."""

    check: Callable[[dict[str, Any]], None]
    """Assert values of the variables after the code."""


def no_names(finished):
    return {}


def loop_names(finished):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs, labels = torch.rand(SAMPLES, 4), torch.arange(SAMPLES) % 3
    data = TensorDataset(inputs, labels, torch.arange(SAMPLES))
    return {
        "sampimp": sampimp,
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(data, batch_size=5, shuffle=True),
        "all_inputs": inputs,
        "all_labels": labels,
        "index_1": torch.arange(0, 5),
        "index_2": torch.arange(5, 10),
    }


def check_loop(names):
    importance = names["importance"]["importance"]
    assert dict(importance.sizes) == {"epoch": 10, "layer": 1, "sample": SAMPLES}
    assert bool((importance > 0).all())


def check_record(names):
    check_loop(names)
    stored = xr.open_zarr("importance.zarr", consolidated=False)
    xr.testing.assert_equal(stored["importance"], names["importance"]["importance"])
    assert names["snapshot"].shape == (1, SAMPLES)
    xr.testing.assert_identical(names["resumed"].to_dataset(), names["importance"])
    accumulated = names["recorder"].to_dataset()["importance"].sel(epoch=10)
    assert bool((accumulated > names["importance"]["importance"].sel(epoch=10))[:, :10].all())
    weight = nn.Parameter(torch.rand(3))
    weight.square().sum().backward()
    names["Softsign"]([weight], lr=0.1).step()


def check_start(names):
    assert dict(names["importance"].sizes) == {"epoch": 5, "layer": 2, "sample": 1500}


def lightning_names(finished):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            inputs, labels, _ = batch
            return functional.cross_entropy(self.net(inputs), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return loop_names(finished) | {"module": Module(), "epochs": [1, 2, 3, 4]}


def hugging_face_names(finished):
    import transformers

    ids = torch.randint(0, 11, (SAMPLES, 6)).tolist()
    rows = [{"input_ids": row, "labels": row, "index": i} for i, row in enumerate(ids)]
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = transformers.TrainingArguments(
        output_dir="trainer",
        remove_unused_columns=False,
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
    )
    gpt = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(gpt, arguments, train_dataset=rows)
    return {"sampimp": sampimp, "trainer": trainer, "epochs": [1]}


def check_trainer(names):
    dataset = names["importance"].recorder.to_dataset()
    assert dataset.sizes["sample"] == SAMPLES
    assert dataset["epoch"].values.tolist() == names["epochs"]


def cube_names(finished):
    shutil.copytree(finished, "results/digits")
    return {}


def check_cube(names):
    nll = names["run"].nll.values[-1]
    hardest = np.argsort(nll)[-10:]
    np.testing.assert_array_equal(names["hardest"].sample, hardest)
    np.testing.assert_array_equal(names["hardest"], nll[hardest])
    label = names["run"].label.values
    for number, summed in enumerate(names["by_class"].transpose("label", ...).values):
        expected = names["run"].importance.values[..., label == number].sum(-1)
        np.testing.assert_allclose(summed, expected, rtol=1e-5)
    assert names["tau"].shape == (1500,)
    assert len(names["digit_names"]) == 10


def data_names(finished):
    return {"sampimp": sampimp}


def check_data(names):
    assert names["data"].train_inputs.shape == (1500, 1, 8, 8)
    assert names["data"].train_labels.shape == (1500,)


def check_importance(names):
    np.testing.assert_allclose(names["ratio"].dropna("sample").values, 50**2, rtol=1e-3)
    np.testing.assert_allclose(float(names["grand"][0]), float(names["norm"]), rtol=1e-4)
    assert names["share"] > 0.9  # of the first batch in Adam's first epoch


def influence_names(finished):
    names = loop_names(finished)
    return names | {"test_inputs": torch.rand(9, 4), "test_labels": torch.arange(9) % 3}


def check_influence(names):
    """The predicted change, against the loop trained again with less weight on the samples."""
    assert dict(names["influence"].sizes) == {"epoch": 5, "layer": 1, "sample": SAMPLES}

    def target(weights):
        model, start = nn.Linear(4, 3).double(), names["starts"][1]["model"]
        model.load_state_dict({name: values.double() for name, values in start.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in names["recorder"].steps:
            losses = names["losses"](lambda x: model(x.double()), step.index)
            optimizer.zero_grad()
            (weights[step.index] * losses).mean().backward()
            optimizer.step()
        return float(names["test_loss"](lambda x: model(x.double())).detach())

    less = torch.ones(SAMPLES, dtype=torch.float64)
    less[[3, 7]] -= 1e-4
    slope = (target(less) - target(torch.ones(SAMPLES, dtype=torch.float64))) / 1e-4
    assert float(names["change"]) == pytest.approx(slope, rel=1e-3)


def subset_names(finished):
    names = cube_names(finished)
    request = SubsetRequest(rules=("tau-high",), sizes=(0.2,), seeds=(1, 2), runs=("shuffle:1",))
    run_here(prepare_subsets(Folder.of("results/digits"), request))
    return names


def check_subsets(names):
    rules = names["cube"]["rule"].values.tolist()
    assert rules == ["full", "chosen", "random", "balanced", "tau-high"]
    assert names["chosen"] in rules
    assert len(names["indices"]) == 300
    assert float(names["distance"].sel(rule="full", size=1.0, budget="steps")) == 0
    assert dict(names["gain"].sizes) == {"size": 2, "budget": 3}


PYTHON = {
    "README.md": Page(loop_names, check_loop),
    "docs/start.md": Page(no_names, check_start),
    "docs/record.md": Page(loop_names, check_record),
    "docs/lightning.md": Page(lightning_names, check_trainer),
    "docs/hugging_face.md": Page(hugging_face_names, check_trainer),
    "docs/cube.md": Page(cube_names, check_cube),
    "docs/data.md": Page(data_names, check_data),
    "docs/importance.md": Page(no_names, check_importance),
    "docs/influence.md": Page(influence_names, check_influence),
    "docs/subsets.md": Page(subset_names, check_subsets),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of the digits with one reference run, made without Ray."""
    out = tmp_path_factory.mktemp("finished") / "study"
    sources = {"digits": load_source("digits")}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, hidden=(16,), batch_size=25)
    oracles.run_trials(oracles.start_study(out, plan, sources), plan, sources)
    return out


def python_of(page):
    """Return the Python snippets of a page, those of notebook cells included."""
    languages = ("python", "{code-cell}")
    return [code for language, code in FENCE.findall(PAGES[page]) if language in languages]


ELSEWHERE = {"docs/tools.md"}  # tests/docs/test_tools.py runs its recipes where tools are installed


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p) and p not in ELSEWHERE])
def test_the_code_of_a_page_runs_in_order(page, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"} | PYTHON[page].names(finished)
    for code in python_of(page):
        exec(compile(code, page, "exec"), names)
    PYTHON[page].check(names)


# Commands


class ParsedError(Exception):
    """A command line was parsed; the program was not run."""


def parsed_only(cli):
    """Return `tyro.cli` without the call of the function that it would make."""

    def parse(function, **options):
        if options.get("prog") == "full_study.py":  # it makes a configuration, and calls nothing
            return cli(function, **options)

        @functools.wraps(function)
        def stop(*_, **__):
            raise ParsedError

        return cli(stop, **options)

    return parse


def call_script(path, arguments):
    """Run a script that passes its `main` to tyro."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tyro.cli(module.main, args=arguments)


PROGRAMS = {
    "sampimp study": options.parse,
    "sampimp status": status.main,
    "sampimp score": score_snapshots.main,
    "sampimp influence": influence.main,
    "sampimp retrain": retrain.main,
    "sampimp subset": subset.main,
    "sampimp consolidate": consolidate.main,
    "sampimp report": report.main,
    "sampimp explore": explore.main,
    "benchmarks/study_overhead.py": functools.partial(call_script, "benchmarks/study_overhead.py"),
}
"""Function that parses the arguments of a program."""

SCRIPTS = {
    "sweeps/full_study.py": "sampimp study",
    "sweeps/status.py": "sampimp status",
    "sweeps/score_snapshots.py": "sampimp score",
    "sweeps/influence.py": "sampimp influence",
    "sweeps/retrain.py": "sampimp retrain",
    "sweeps/subset.py": "sampimp subset",
    "sweeps/consolidate.py": "sampimp consolidate",
    "analysis.report": "sampimp report",
}
"""Scripts of a checkout, and the command that does the same."""

CHEAP = (
    *("sampimp status OUT", "sampimp status OUT --verify", "sampimp consolidate OUT"),
    *("sampimp report OUT", "sampimp explore OUT"),
)
"""Commands that are also run, on a small study."""

PIP_INSTALL = ["pip", "install"]
IS_COMMAND = re.compile(r"(python|make|pip|ray|sampimp) |\S+\.py\b|--\w")


def commands_of(text):
    """Return the commands of a page: indented lines, and spans in backticks that are commands."""
    prose = FENCE.sub("", text)
    lines = [
        line.partition("  #")[0].strip()
        for line in prose.splitlines()
        if re.match(r" {4}(make|pip|ray|sampimp|python)\b", line)
    ]
    in_fences = [
        match.strip().strip("\\")
        for language, code in FENCE.findall(text)
        if language in ("bash", "yaml", "dockerfile")
        for match in re.findall(r"(?:sampimp study|python sweeps/\w+\.py).*$", code, re.MULTILINE)
    ]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    return [*lines, *in_fences, *filter(IS_COMMAND.match, spans)]


COMMANDS = list(dict.fromkeys(c for text in PAGES.values() for c in commands_of(text)))


def parses(program, arguments):
    with contextlib.suppress(ParsedError):
        try:
            PROGRAMS[program](arguments)
        except SystemExit:
            return False
    return True


def options_of(program):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        PROGRAMS[program](["--help"])
    return set(re.findall(r"--[\w-]+", text.getvalue()))


def check_pip(words):
    extras = re.findall(r"\[(.*)\]", words[-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"])


def check_options(words):
    """Options without a program: of a study, a page, scores or subsets, or of any program."""
    if all(word.startswith("--") for word in words):
        assert set(words) <= set().union(*map(options_of, PROGRAMS))
    else:
        assert (
            parses("sampimp study", words)
            or parses("sampimp report", ["OUT", *words])
            or parses("sampimp score", ["OUT", *words])
            or parses("sampimp subset", ["OUT", *words])
            or parses("sampimp explore", ["OUT", *words])
        )


def check_program(words):
    words = [word for word in words if word not in ("python", "-m")]
    if words[0] == "sampimp":
        program, arguments = " ".join(words[:2]), words[2:]
    else:
        program, arguments = SCRIPTS.get(words[0], words[0]), words[1:]
    assert program in PROGRAMS
    assert not arguments or parses(program, arguments)


def test_every_subcommand_has_a_parser():
    subcommands = {f"sampimp {name}" for name in command.SUBCOMMANDS}
    assert subcommands == {program for program in PROGRAMS if program.startswith("sampimp ")}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_parsed_by_its_program(line, monkeypatch):
    monkeypatch.setattr(tyro, "cli", parsed_only(tyro.cli))
    words = shlex.split(line)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "ray":
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
    elif words[:2] == PIP_INSTALL:
        check_pip(words)
    elif words[0].startswith("--"):
        check_options(words)
    elif len(words) == 1:
        assert (ROOT / words[0]).is_file()
    else:
        check_program(words)


@pytest.mark.parametrize("line", CHEAP)
def test_a_cheap_command_is_run(finished, tmp_path, line, capsys):
    assert line in COMMANDS
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    _, name, *arguments = [str(out) if word == "OUT" else word for word in shlex.split(line)]
    assert PROGRAMS[f"sampimp {name}"](arguments) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")


# Other snippets


@pytest.mark.parametrize("page", PAGES)
def test_shell_scripts_and_yaml_are_well_formed(page):
    for language, code in FENCE.findall(PAGES[page]):
        if language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        elif language == "yaml":
            assert yaml.safe_load(code)
        elif language == "dockerfile":
            assert all(re.match(r"FROM|COPY|RUN", line) for line in code.splitlines())
            (extras,) = re.findall(r"\[[\w,]+\]", code)
            check_pip(["pip", "install", extras])
        else:
            assert language in ("python", "") or language.startswith("{"), language


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_name_files(page):
    prose = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        is_built = "gallery/" in target or target.startswith("http")
        assert is_built or ((ROOT / page).parent / target).is_file(), target
