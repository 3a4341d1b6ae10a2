"""Options and checks of a study: every mistake that is refused before anything is trained."""

import json
import shutil
import socket
import sys
from collections import namedtuple
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from ray import tune
from ray.exceptions import OutOfMemoryError
from rich.console import Console

from sampimp.data import load_source
from sampimp.errors import (
    ConfigError,
    ResourceError,
    StoreError,
    UnsupportedError,
    UserError,
)
from sampimp.schema import REFERENCES, STRATEGIES
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.sweeps import cluster as cluster_module
from sampimp.sweeps import full_study
from sampimp.sweeps.cluster import connect
from sampimp.sweeps.machines import Cluster, Machines
from sampimp.sweeps.options import StudyConfig, parse
from sampimp.sweeps.preflight import check_cluster
from sampimp.sweeps.run import conclude, write_plan
from sampimp.sweeps.study import concurrent_trials, make_plan, prepare_study, trial_bytes

DIGITS = ("--preset", "digits", "--hidden", "16", "--epochs", "3", "--influence", "--subsets")


def four_parts(error: UserError) -> str:
    """Return the message of an error, after checking its four parts."""
    assert all(part.strip() for part in error.args)
    lines = str(error).splitlines()
    heads = ("Expected ", "     Got ", "   Where ", "   To do ")
    assert [line for line in lines if line.startswith(heads)] == lines
    return str(error)


def put_plan(out, *arguments):
    """Write the study.json of a study, and train nothing."""
    plan = make_plan(parse([*arguments]), {"digits": load_source("digits")})
    Folder.of(out).write_json("study.json", plan.to_json())


def write_npz(path, **changes):
    arrays = {
        "train_inputs": np.random.default_rng(0).random((12, 5)),
        "train_labels": np.arange(12) % 3,
        "test_inputs": np.zeros((3, 5)),
        "test_labels": np.arange(3),
    }
    np.savez(path, **{**arrays, **changes})


# Options.


def test_the_papers_study():
    config = parse([])
    assert config == StudyConfig(may_thin_states=True)
    assert config.datasets == ("mnist", "cifar10")
    assert (config.hidden, config.epochs, config.batch_size) == ((512, 512, 512), 50, 100)
    assert (config.learning_rate, config.weight_decay) == (0.1, 1e-5)
    grid = config.grid()
    assert grid == dict.fromkeys(REFERENCES, (1, 2, 3)) | dict.fromkeys(STRATEGIES, (1, 2, 3, 4, 5))
    assert list(grid) == [*REFERENCES, *STRATEGIES]


def test_the_preset_digits_is_smaller():
    config, paper = parse(["--preset", "digits"]), StudyConfig(may_thin_states=True)
    assert config == parse(["--preset=digits"])
    different = {name for name in vars(paper) if getattr(paper, name) != getattr(config, name)}
    assert different == {
        *("preset", "datasets", "hidden", "batch_size", "out", "influence", "subsets")
    }
    assert (config.influence, parse(["--preset", "digits", "--influence"]).influence) == (
        ("mean", "probe:16"),
        (),
    )
    assert (config.datasets, config.out) == (("digits",), "results/digits")


def test_options_override_the_preset():
    arguments = "--datasets digits --hidden 16 16 --seeds 1 2 --preset digits --learning-rate 0.2"
    config = parse([*arguments.split(), "--gpus-per-trial", "0.5", "--cpus-per-trial", "2"])
    assert (config.hidden, config.seeds, config.learning_rate) == ((16, 16), (1, 2), 0.2)
    assert config.batch_size == 50  # the preset's
    training = config.training()
    assert (training.hidden, training.threads, training.device) == ((16, 16), 2, "cuda")
    assert parse([]).training().device == "cpu"


@pytest.mark.parametrize(
    ("strategies", "reference_seeds", "grid"),
    [
        (("rand",), (1,), {"rand": (4, 5)}),
        (("shuffle",), (2, 3), {"shuffle": (2, 3)}),
        (("nlo",), (2, 3), {"shuffle": (1,), "nlo": (4, 5)}),
        (("sim", "rand"), (1,), {"shuffle": (1,), "rand": (4, 5), "sim": (4, 5)}),
        (("sio", "shuffle"), (3, 2), {"shuffle": (1, 2, 3), "sio": (4, 5)}),
        (
            ("rsio", "shuffle_by_seed"),
            (2,),
            {"shuffle": (1,), "shuffle_by_seed": (2,), "rsio": (4, 5)},
        ),
    ],
)
def test_the_reference_run_is_added_for_strategies_that_sort(strategies, reference_seeds, grid):
    config = StudyConfig(strategies=strategies, reference_seeds=reference_seeds, seeds=(4, 5))
    assert config.grid() == grid
    assert next(iter(config.grid())) == next(iter(grid))


# Wrong options.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--preset digit", ("paper, digits", "'digit'", "did you mean digits?")),
        ("--preset", ("paper, digits",)),
        ("--strategies nlo nln", ("'nln'", "did you mean nlo?")),
        ("--strategies NLM", ("'NLM'", "rsio, sim")),
        ("--datasets mnits", ("'mnits'", "did you mean 'mnist'?")),
        ("--datasets digits digits", ("digits given twice", "option --datasets")),
        ("--seeds 1 2 1", ("1 given twice", "option --seeds")),
        ("--seeds", ("none", "option --seeds")),
        ("--reference-seeds 2 2", ("2 given twice", "option --reference-seeds")),
        ("--strategies sim sim", ("sim given twice",)),
        ("--epochs 0", ("epochs to be at least 1", "option --epochs")),
        ("--learning-rate nan", ("a positive number", "nan", "option --learning-rate")),
        ("--batch-size -3", ("at least 1", "-3", "option --batch-size")),
        ("--hidden 16 0", ("at least 1 unit each", "(16, 0)")),
        ("--cpus-per-trial 0", ("at least 1 CPU", "0 and 0")),
        ("--gpus-per-trial -1", ("0 GPUs", "1 and -1")),
        ("--snapshot-every 3 --parameters-every 2", ("a multiple", "3, 2")),
        ("--snapshot-every 3 --parameters-every 0", ("a multiple", "3, 0")),
        ("--snapshot-every 60", ("up to --epochs", "60, 1 and 50")),
        ("--snapshot-every -5", ("up to --epochs", "-5, 1 and 50")),
    ],
)
def test_a_wrong_option_is_named(arguments, words):
    with pytest.raises(ConfigError) as caught:
        parse(arguments.split())
    message = four_parts(caught.value)
    assert all(word in message for word in words), message


def test_unknown_options_exit_with_2(capsys):
    for arguments in (["--epochs", "many"], ["--no-such-option", "3"]):
        with pytest.raises(SystemExit) as exit_:
            full_study.main(arguments)
        assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert "--epochs" in text
    assert "--no-such-option" in text


def test_a_negative_seed_is_refused_before_anything_is_written(run_untrained, tmp_path):
    with pytest.raises(ConfigError, match="seed to be at least 0") as caught:
        run_untrained(tmp_path / "study", *DIGITS, "--strategies", "rand", "--seeds", "-1")
    four_parts(caught.value)
    assert not (tmp_path / "study" / "study.json").exists()


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """Return a function that writes a module of networks, which `--model` can name."""

    def write(text, name="own_models"):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)  # which also clears the import caches
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


BATCH_NORM = """
from torch import nn

def make(input_shape, class_count):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

def freeze(input_shape, class_count):
    model = make(input_shape, class_count)
    model[2].eval()
    return model
"""


def test_a_batch_norm_is_refused_with_the_options_of_a_study(own_models, run_untrained, tmp_path):
    own_models(BATCH_NORM)
    arguments = (*DIGITS, "--dry-run", "--model")
    with pytest.raises(UnsupportedError, match="BatchNorm1d, which mixes samples") as caught:
        run_untrained(tmp_path / "study", *arguments, "own_models:make")
    message = four_parts(caught.value)
    assert "option --model own_models:make, module 2" in message
    assert ".eval() in the function that makes the model" in message
    assert "batch_norm=" not in message  # an argument of the recorder's
    assert run_untrained(tmp_path / "study", *arguments, "own_models:freeze")[0] == 0


LINEAR = """
from torch import nn

def make(input_shape, class_count):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, class_count))
    model[1].weight.data.mul_(1)
    return model
"""


@pytest.mark.parametrize(
    ("before", "after", "different"),
    [
        ("return model", "return model  # the same", "source"),
        (
            "nn.Linear(64, class_count)",
            "nn.Linear(64, class_count, bias=False)",
            "source, parameter shapes (1.bias absent, was [10])",
        ),
        ("mul_(1)", "mul_(2)", "source, initial values, outputs for the same samples"),
    ],
)
def test_another_network_of_the_same_name_is_refused(
    own_models, run_untrained, tmp_path, before, after, different
):
    out = tmp_path / "study"
    arguments = (*DIGITS, "--model", "own_models:make", "--strategies", "rand", "--seeds", "1")
    own_models(LINEAR)
    put_plan(out, *arguments)
    stored = (out / "study.json").read_bytes()
    own_models(LINEAR)
    assert run_untrained(out, *arguments, "--dry-run")[0] == 0
    own_models(LINEAR.replace(before, after))
    write_npz(tmp_path / "mine.npz", train_inputs=np.zeros((12, 64)), test_inputs=np.zeros((3, 64)))
    with pytest.raises(ConfigError, match="when the study began") as caught:
        run_untrained(out, *arguments)
    message = four_parts(caught.value)
    assert f"another network; different: {different}\n" in message
    assert str(out) in message
    # A data set that is added cannot bring another network.
    added = (*arguments, "--datasets", f"npz:{tmp_path / 'mine.npz'}")
    with pytest.raises(ConfigError, match="different: source\n"):
        run_untrained(out, *added)
    own_models(LINEAR)
    assert run_untrained(out, *added, "--dry-run")[0] == 0
    assert (out / "study.json").read_bytes() == stored


def test_a_study_without_the_identity_of_its_network_is_read_and_not_continued(
    own_models, run_untrained, tmp_path
):
    out = tmp_path / "study"
    arguments = (*DIGITS, "--model", "own_models:make", "--strategies", "rand", "--seeds", "1")
    own_models(LINEAR)
    put_plan(out, *arguments)
    plan = json.loads((out / "study.json").read_text())
    del plan["datasets"]["digits"]["network"]
    (out / "study.json").write_text(json.dumps(plan))
    assert open_cube(out)["digits/make"].sizes["epoch"] == 3
    with pytest.raises(ConfigError, match="recorded the name only") as caught:
        run_untrained(out, *arguments)
    assert "can still be read" in four_parts(caught.value)


# The folder or bucket.


def test_out_is_a_file(run_untrained, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    with pytest.raises(StoreError, match="a file") as caught:
        run_untrained(out, *DIGITS)
    assert str(out) in four_parts(caught.value)
    assert out.read_text() == "mine"


def test_out_holds_something_else(run_untrained, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(StoreError, match="holds something else") as caught:
        run_untrained(tmp_path, *DIGITS)
    assert "nothing there was touched" in four_parts(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.tex"]


@pytest.mark.parametrize("where", ["{tmp_path}/file/study", "/proc/no-such-folder/study"])
def test_out_cannot_be_written(run_untrained, tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    out = where.format(tmp_path=tmp_path)
    with pytest.raises(StoreError) as caught:
        run_untrained(out, *DIGITS)
    assert out in four_parts(caught.value)


@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_s3_without_credentials(run_untrained, monkeypatch, tmp_path, extra):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StoreError, match="credentials") as caught:
        run_untrained("s3://no-such-bucket/study", *DIGITS, *extra)
    assert "s3://no-such-bucket/study" in four_parts(caught.value)


def test_another_kind_of_url(run_untrained):
    with pytest.raises(StoreError, match="a folder or an s3:// URL") as caught:
        run_untrained("gs://bucket/study", *DIGITS)
    four_parts(caught.value)


def test_another_configuration_into_the_same_out(run_untrained, tmp_path):
    put_plan(tmp_path, *DIGITS)
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        run_untrained(tmp_path, *DIGITS, "--learning-rate", "0.2", "--rand-batches", "by_seed")
    message = four_parts(caught.value)
    assert "learning_rate 0.1 (requested: 0.2)" in message
    assert "rand_batches 'shared' (requested: 'by_seed')" in message
    assert str(tmp_path) in message
    assert (tmp_path / "study.json").read_bytes() == before


def test_more_seeds_strategies_and_data_sets_are_accepted(run_untrained, tmp_path):
    out = tmp_path / "study"
    put_plan(out, *DIGITS, "--strategies", "rand", "--seeds", "1")
    write_npz(tmp_path / "mine.npz")
    more = ("--strategies", "nlm", "rand", "--seeds", "2", "--reference-seeds", "1", "--dry-run")
    datasets = ("--datasets", "digits", f"npz:{tmp_path / 'mine.npz'}")
    code, text = run_untrained(out, *DIGITS, *more, *datasets)
    assert code == 0
    assert "rand             seeds 1, 2\n" in text
    assert "nlm              seeds 2\n" in text
    assert "npz-mine: 12 + 3 samples, 3 classes" in text
    assert "8 in all, 8 of them missing" in text  # (2 rand, 1 nlm, 1 shuffle) on two data sets


# Machines and disk.


@pytest.mark.parametrize("gpus", ["1", "0.5"])
def test_no_gpu(run_untrained, tmp_path, gpus):
    with pytest.raises(ResourceError, match="GPU") as caught:
        run_untrained(tmp_path, *DIGITS, "--gpus-per-trial", gpus)
    assert f"a node with 1 CPUs and {gpus} GPU a trial" in four_parts(caught.value)
    assert "0 GPUs" in str(caught.value)


def test_more_cpus_than_there_are(run_untrained, tmp_path):
    with pytest.raises(ResourceError, match="a node with 4 CPUs a trial") as caught:
        run_untrained(tmp_path, *DIGITS, "--cpus-per-trial", "4")
    four_parts(caught.value)


def test_a_fraction_of_a_gpu_puts_several_trials_on_one():
    config = parse(["--gpus-per-trial", "0.25", "--cpus-per-trial", "2"])
    machines = Cluster("four nodes", (Machines(4, cpus=16, gpus=1),))
    check_cluster(config, machines)
    assert concurrent_trials(config, machines) == 16
    assert concurrent_trials(parse(["--max-concurrent", "3"]), machines) == 3
    assert str(machines) == "four nodes: 4 nodes, 64 CPUs, 4 GPUs"


def test_too_little_disk(run_untrained, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**5, 10**5))
    with pytest.raises(ResourceError, match="MB free") as caught:
        run_untrained(tmp_path / "study", *DIGITS)
    four_parts(caught.value)
    assert not (tmp_path / "study" / "study.json").exists()


def test_bytes_of_a_trial():
    plan = make_plan(parse([*DIGITS]), {"digits": load_source("digits")})
    # An epoch: 1,500 samples x (2 layers + NLL + batch) x 4 bytes = 24,000. Parameters: 1,210 x 4
    # bytes in 4 states, in two checkpoints and in the third while it is written.
    assert trial_bytes(plan, plan.trials()[0]) == 3 * 24_000 + (4 + 3) * 4 * 1_210


def test_a_small_table_stores_few_states_unless_the_option_or_the_plan_says_more(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "table.npz"
    labels = {"train_labels": np.arange(60) % 3, "test_labels": np.arange(30) % 3}
    inputs = {name: rng.normal(size=(n, 10)) for name, n in (("train", 60), ("test", 30))}
    write_npz(file, **labels, **{f"{part}_inputs": values for part, values in inputs.items()})

    def states(*more, out="study", store=False):
        options = ["--datasets", f"npz:{file}", "--strategies", "rand", "--epochs", "12"]
        console = Console(file=StringIO(), width=300)
        config = parse([*options, *more, "--out", str(tmp_path / out)])
        machine = Cluster("x", (Machines(1, cpus=2, gpus=0),))
        study = prepare_study(config, lambda: machine, load_source, console)
        if store:
            write_plan(study, console)
        return study.plan.training.stored_states(), console.file.getvalue()

    # The paper's network: 10 x 512 + 512 + 2 (512 x 512 + 512) + 512 x 3 + 3 = 532,483 parameters
    # in 13 states, and 60 samples x (4 layers + 2) in 12 epochs: 1,602 times.
    every, said = states()
    assert every == [0, 3, 6, 9, 12]
    assert "after every 3 epochs" in said
    assert "1,602 times" in said
    assert states("--parameters-every", "1")[0] == list(range(13))
    assert states("--parameters_every=6")[0] == [0, 6, 12]
    assert states("--snapshot-every", "1")[0] == list(range(13))
    # 10 x 4 + 4 + 4 x 3 + 3 = 59 parameters: all states have a fourth of the importance's bytes.
    every, said = states("--hidden", "4")
    assert every == list(range(13))
    assert said == (
        "npz-table: 60 samples are no multiple of 100, so there is one batch of 60 samples, each "
        "sample in one of them.\n"
    )
    # A study goes on with the states of its plan.
    assert states("--parameters-every", "1", store=True)[0] == list(range(13))
    assert states() == (list(range(13)), "")


def test_out_of_memory_names_the_trials_at_a_time(run_study, monkeypatch, tmp_path):
    def killed(self):
        cause = OutOfMemoryError("1 worker(s) were killed: 22.38GB used / 23.54GB limit\nat length")
        raise RuntimeError(f"Caught unexpected exception: {cause}") from cause

    monkeypatch.setattr(tune.Tuner, "fit", killed)
    with pytest.raises(ResourceError, match=r"killed: 22.38GB used / 23.54GB limit\n") as caught:
        run_study(tmp_path / "study", *DIGITS)
    assert "the trials that run at a time, 1\n" in four_parts(caught.value)


def test_no_cluster_at_the_address(monkeypatch):
    def nobody(**_):
        raise ConnectionError("nobody answers\nat length")

    monkeypatch.setattr(cluster_module.ray, "init", nobody)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        for option in (address, None):
            with pytest.raises(ResourceError, match="nobody answers\n") as caught:
                connect(option)
            assert f"address {address}" in four_parts(caught.value)


# Data sets.


def test_batches_of_unequal_size_are_announced(run_untrained, tmp_path):
    _, text = run_untrained(tmp_path / "a", *DIGITS, "--batch-size", "70", "--dry-run")
    # 1,500 = 21 x 70 + 30: 22 batches, of which 1,500 - 22 x 68 = 4 have one more than 68.
    assert (
        "digits: 1,500 samples are no multiple of 70, so there are 22 batches of 68 or 69 samples, "
        "each sample in one of them." in text
    )
    _, text = run_untrained(tmp_path / "b", *DIGITS, "--batch-size", "75", "--dry-run")
    assert "multiple" not in text


def main_fails(arguments, capsys) -> str:
    """Return the error of a command, after checking that it prints nothing else."""
    assert full_study.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert out.startswith("41 trials of 50 epochs on ")
    assert out.count("\n") == 1
    assert err.startswith("Expected ")
    assert all(f"\n{head} " in err for head in ("     Got", "   Where", "   To do"))
    return err


def test_bad_arrays_end_with_2(run_untrained, tmp_path, capsys):
    file, out = tmp_path / "mine.npz", tmp_path / "study"
    arguments = ("--datasets", f"npz:{file}", "--out", str(out))
    assert "no such file" in main_fails(arguments, capsys)
    inputs = np.zeros((12, 5))
    inputs[7, 2] = np.nan
    write_npz(file, train_inputs=inputs)
    assert "nan at sample 7, position [2] (1 such values)" in main_fails(arguments, capsys)
    write_npz(file, train_labels=np.arange(12) - 1)
    assert "-1 at sample 0" in main_fails(arguments, capsys)
    write_npz(file, test_labels=np.array([0, 1, 99]))
    assert "99 at sample 2" in main_fails(arguments, capsys)
    write_npz(file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "bytes that is not" in main_fails(arguments, capsys)
    assert not out.exists()


def test_a_missing_class_folder_ends_with_2(run_untrained, tmp_path, capsys):
    for name in ("train/ant", "train/bee", "test/ant"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.png")
    arguments = ("--datasets", f"folder:{tmp_path / 'images'}", "--out", str(tmp_path / "study"))
    text = main_fails(arguments, capsys)
    assert "the same class folders in train/ and test/" in text
    assert "in train/ alone: bee" in text
    assert not (tmp_path / "study").exists()


def test_stored_images_keep_their_size(tmp_path):
    for part, sides in (("train", (9, 14)), ("test", (20,))):
        for name in ("ant", "bee"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for side in sides:
                image = Image.new("RGB", (side, 10), "red")
                image.save(tmp_path / "images" / part / name / f"{side}.png")
    machine = Cluster("x", (Machines(1, cpus=2, gpus=0),))

    def prepare(*more):
        options = ["--datasets", f"folder:{tmp_path / 'images'}", "--out", str(tmp_path / "study")]
        console = Console(file=StringIO())
        return prepare_study(parse([*options, *more]), lambda: machine, load_source, console)

    with pytest.raises(ConfigError, match="at least 1 pixel"):
        parse(["--image-size", "0"])
    first = prepare("--image-size", "8")
    assert first.plan.datasets["folder-images"].input_shape == (3, 8, 8)
    write_plan(first, Console(file=StringIO()))
    shutil.rmtree(tmp_path / "images")  # a restart reads the store
    again = prepare("--image-size", "8").sources["folder-images"]
    assert again.image_size == 8
    assert again.digest == first.sources["folder-images"].digest
    for more, got in (((), "no --image-size"), (("--image-size", "9"), "--image-size 9")):
        with pytest.raises(ConfigError, match=f"Got {got}") as caught:
            prepare(*more)
        assert "--image-size 8, with which" in four_parts(caught.value)


def test_a_truncated_image_ends_with_2(cluster, run_untrained, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "1.jpg")
    broken = tmp_path / "images" / "train" / "bee" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    arguments = ("--datasets", f"folder:{tmp_path / 'images'}", "--out", str(tmp_path / "study"))
    text = main_fails(arguments, capsys)
    assert "Expected a readable image" in text
    assert str(broken) in text
    assert not (tmp_path / "study").exists()


def test_two_data_sets_of_one_name(run_untrained, tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write_npz(tmp_path / part / "mine.npz")
    names = [f"npz:{tmp_path / part / 'mine.npz'}" for part in ("a", "b")]
    with pytest.raises(ConfigError, match="two called npz-mine") as caught:
        run_untrained(tmp_path / "study", "--datasets", *names)
    four_parts(caught.value)


def test_the_conclusion_names_missing_trials():
    config = parse([*DIGITS, "--strategies", "rand", "--seeds", "1"])
    plan = make_plan(config, {"digits": load_source("digits")})
    console = Console(file=StringIO(), width=200)
    assert conclude(plan.resolve({}), console) == 1
    assert "0 of 1 trials are committed." in console.file.getvalue()
    assert "1 are missing: digits-rand-seed1." in console.file.getvalue()
