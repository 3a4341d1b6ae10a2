"""Every snippet of README does what it says: the code is run, commands are parsed or run.

A snippet that is added fails here until something below runs it: code needs a place in `PYTHON`, a
command a program in `PROGRAMS` that takes its options.
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
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
import xarray as xr
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sampimp
from sampimp.analysis import report
from sampimp.sweeps import consolidate, score_snapshots, status, study

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", README)
SAMPLES = 20


# ------------------------------------------------------------------------------ code


def cube(names):
    """The study is that of the tests, where README's is."""
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


def loop(names):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = TensorDataset(torch.rand(SAMPLES, 4), torch.arange(SAMPLES) % 3, torch.arange(SAMPLES))
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(data, batch_size=5, shuffle=True),
    }


def check_loop(names):
    stored = xr.open_zarr("importance.zarr", consolidated=False)
    assert dict(stored.sizes) == {"epoch": 10, "layer": 1, "sample": SAMPLES}
    assert bool((stored["importance"] > 0).all())
    xr.testing.assert_equal(stored["importance"], names["importance"]["importance"])


def trainers(names):
    """Two trainers that are given little to do."""
    import lightning
    import transformers

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            inputs, labels, _ = batch
            return functional.cross_entropy(self.net(inputs), labels)

        def on_train_epoch_end(self):
            self.trainer.should_stop = True

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

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
    return {"lightning": lightning, "module": Module(), "trainer": trainer}


def check_trainers(names):
    assert names["importance"].recorder.to_dataset().sizes["sample"] == SAMPLES


PYTHON = ((cube, check_cube), (loop, check_loop), (trainers, check_trainers))
"""What each snippet needs beside what those before it have left, and what is seen of it."""


def test_the_code_runs_in_order(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.out, tmp_path / "results" / "digits")
    monkeypatch.chdir(tmp_path)
    names = {"sampimp": sampimp}
    snippets = FENCE.findall(README)
    assert {language for language, _ in snippets} == {"python"}
    for (_, code), (prepare, check) in zip(snippets, PYTHON, strict=True):
        names |= prepare(names)
        exec(compile(code, "README.md", "exec"), names)
        check(names)


# -------------------------------------------------------------------------- commands


class ParsedError(Exception):
    """A command line was understood; nothing was done."""


def parsed_only(cli):
    """Return `tyro.cli` with the function that it would call left out."""

    def parse(function, **options):
        if options.get("prog") == "full_study.py":  # it makes a configuration, and calls nothing
            return cli(function, **options)

        @functools.wraps(function)
        def stop(*_, **__):
            raise ParsedError

        return cli(stop, **options)

    return parse


def call_script(path, arguments):
    """Run a script that gives its `main` to tyro."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tyro.cli(module.main, args=arguments)


PROGRAMS = {
    "sweeps/full_study.py": study.parse,
    "sweeps/status.py": status.main,
    "sweeps/score_snapshots.py": score_snapshots.main,
    "sweeps/consolidate.py": consolidate.main,
    "analysis.report": report.main,
    "benchmarks/study_overhead.py": functools.partial(call_script, "benchmarks/study_overhead.py"),
}
"""What reads the arguments of a program."""

CHEAP = ("sweeps/status.py", "sweeps/consolidate.py")
"""They are run as well, on the tests' study."""

OTHERS = {"ray start": (), "ray up cluster.yaml": ("cluster.yaml",)}
"""Commands of others, and the files of ours that they name."""


def commands():
    """Return every command of README: indented lines, and words in backticks that are one."""
    lines = [line.partition("  #")[0].strip() for line in PROSE.splitlines() if line[:4] == " " * 4]
    spans = re.findall(r"`([^`]+)`", PROSE)
    is_command = re.compile(r"(python|make|pip|ray) |\S+\.py\b|--\w")
    return list(dict.fromkeys([*lines, *filter(is_command.match, spans)]))


def understands(program, arguments):
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


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one(command, monkeypatch):
    monkeypatch.setattr(tyro, "cli", parsed_only(tyro.cli))
    words = shlex.split(command)
    if command in OTHERS:
        assert all((ROOT / file).is_file() for file in OTHERS[command])
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[2])[1].split(",")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= set(project["optional-dependencies"])
    elif words[0].startswith("--"):
        if all(word.startswith("--") for word in words):
            assert set(words) <= set().union(*map(options_of, PROGRAMS))
        else:
            study_takes_it = understands("sweeps/full_study.py", words)
            assert study_takes_it or understands("analysis.report", ["OUT", *words])
    elif len(words) == 1:
        assert (ROOT / words[0]).is_file() or (ROOT / "examples" / words[0]).is_file()
    else:
        program, *arguments = [word for word in words if word not in ("python", "-m")]
        assert understands(program, arguments)


@pytest.mark.parametrize("program", CHEAP)
def test_a_cheap_command_is_run(finished, tmp_path, program, capsys):
    out = tmp_path / "study"
    shutil.copytree(finished.out, out)
    (command,) = (c for c in commands() if program in c)
    arguments = [str(out) if word == "OUT" else word for word in shlex.split(command)[2:]]
    assert PROGRAMS[program](arguments) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
