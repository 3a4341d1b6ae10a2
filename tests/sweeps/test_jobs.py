"""Studies sent to a cluster as jobs: options, log, exit code, jobs that run already.

tests/cluster tests a real cluster; here a script replaces `ray exec`.
"""

import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from sampimp.errors import ConfigError, ResourceError
from sampimp.sweeps import full_study, influence, jobs, retrain
from sampimp.sweeps.options import parse

SENT = ["--preset", "digits", "--out", "s3://bucket/study"]


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: none\n")
    return str(path)


@pytest.fixture
def send(cluster, monkeypatch):
    """Send a study with a script in place of `ray exec`; return the exit code and the output."""

    def send(script):
        popen = jobs.subprocess.Popen
        monkeypatch.setattr(
            jobs.subprocess,
            "Popen",
            lambda command, **options: popen([sys.executable, "-c", script, *command], **options),
        )
        console = Console(file=StringIO(), width=200)
        arguments = [*SENT, "--cluster", cluster]
        return jobs.send(parse(arguments), arguments, console), console.file.getvalue()

    return send


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("results/paper, which is in this folder", "option --out", "s3://BUCKET/NAME")),
        (["--out", "../study"], ("../study", "option --out")),
        (["--out", "/srv/study", "--data-dir", "data"], ("data, which", "option --data-dir")),
        (
            ["--out", "/srv/study", "--datasets", "folder:cats"],
            ("cats, which", "option --datasets folder:cats"),
        ),
        (["--out", "/srv/study", "--address", "auto"], ("one cluster", "--address auto")),
    ],
)
def test_a_path_that_the_cluster_cannot_see_is_refused(cluster, capsys, arguments, words):
    assert full_study.main([*arguments, "--cluster", cluster]) == 2
    text = capsys.readouterr().err
    assert [line[:8] for line in text.splitlines()] == [
        "Expected",
        "     Got",
        "   Where",
        "   To do",
    ]
    assert all(word in text for word in words), text


def test_a_missing_yaml_file_is_refused():
    with pytest.raises(ConfigError, match=r"option --cluster nowhere\.yaml"):
        jobs.send(parse([*SENT, "--cluster", "nowhere.yaml"]), SENT, Console(quiet=True))


def test_absolute_paths_and_buckets_are_accepted(cluster, monkeypatch):
    monkeypatch.setattr(jobs, "_send", lambda cluster, arguments, console: 7)
    options = [
        "--out",
        "/srv/study",
        "--data-dir",
        "/srv/data",
        "--datasets",
        "npz:/srv/a.npz",
        "digits",
    ]
    assert jobs.send(parse([*options, "--cluster", cluster]), options, Console(quiet=True)) == 7


@pytest.mark.parametrize("door", [influence, retrain], ids=["influence", "retrain"])
def test_what_is_computed_from_runs_is_sent_beside_the_study(door, cluster, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(jobs, "_send", lambda *arguments: sent.append(arguments) or 5)
    name = door.__name__.rpartition(".")[2]
    options = ["--targets", "mean", "class"]
    assert door.main(["s3://b/study", *options, "--cluster", cluster]) == 5
    ((where, command, _),) = sent
    assert (where, command) == (cluster, [name, "s3://b/study", "s3://b/study", *options])
    assert door.main(["study", "--cluster", cluster]) == 2
    assert "option OUT, with --cluster" in capsys.readouterr().err
    # On the head the command begins with its name and its study.
    submitted = []

    class Client:
        def list_jobs(self):
            return []

        def submit_job(self, **job):
            submitted.append(job)
            return job["submission_id"]

        async def tail_job_logs(self, job):
            yield "log"

        def get_job_info(self, job):
            return SimpleNamespace(status=JobStatus.SUCCEEDED)

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    assert jobs.main(command) == 0
    assert jobs.main(["--preset", "digits", "--out", "s3://b/study"]) == 0
    derived, study = submitted
    assert derived["entrypoint"].endswith(
        f"-m sampimp.sweeps.{name} s3://b/study {' '.join(options)}"
    )
    assert study["entrypoint"].endswith(
        "sampimp.sweeps.full_study --preset digits --out s3://b/study"
    )
    assert derived["submission_id"] != study["submission_id"]


def test_the_log_is_shown_and_the_exit_code_is_the_studys(send, cluster):
    code, text = send(
        "import sys\n"
        "print('Fetched IP: 10.0.0.1')\n"
        "print('sampimp-job sent sampimp-1f0c-1\\r')\n"
        "print('[bold]5 trials[/]\\r')\n"
        "print(sys.argv[-2:])\n"
        "print('sampimp-job ended 3\\r')\n"
        "print('Shared connection to 10.0.0.1 closed.')\n"
    )
    assert code == 3
    head, *log = text.splitlines()
    assert head == (f"The study runs as job sampimp-1f0c-1 on {cluster}. Ctrl-C leaves it running.")
    command = "python -m sampimp.sweeps.jobs --preset digits --out s3://bucket/study"
    assert log == ["[bold]5 trials[/]", str([cluster, command])]


@pytest.mark.parametrize(
    ("word", "message"), [("found", "runs already"), ("differs", "with OTHER OPTIONS")]
)
def test_a_study_that_runs_is_attached_to(send, word, message):
    code, text = send(f"print('sampimp-job {word} a-2')\nprint('sampimp-job ended 0')")
    assert code == 0
    assert message in text
    assert "as job a-2" in text


def test_a_lost_connection_prints_how_to_attach_again(send, cluster):
    code, text = send("print('sampimp-job sent a-1')\nprint('0:30  5 trials')")
    assert code == 130
    assert "The connection is lost; the study goes on as job a-1." in text
    assert f"Stop it: ray exec {cluster} 'ray job stop a-1'" in text


def test_a_cluster_that_is_not_up(send):
    with pytest.raises(ResourceError, match="Head node of cluster none not found") as caught:
        send(
            "print('Head node of cluster none not found!')\n"
            "print('Error: Command failed:\\n\\n  ssh -tt ...')"
        )
    assert "ray up" in str(caught.value)


# On the head.


def job(submission_id, status, entrypoint="python"):
    return SimpleNamespace(submission_id=submission_id, status=status, entrypoint=entrypoint)


def test_one_study_is_one_job_at_a_time():
    _, _, first = jobs.choose([], "s3://b/study")
    assert first.endswith("-1")
    name = first[:-2]
    assert jobs.choose([], "s3://b/other")[2][:-2] != name
    ended = [job(f"{name}-1", JobStatus.FAILED), job(f"{name}-2", JobStatus.STOPPED)]
    others = [job(None, JobStatus.RUNNING), job("raysubmit_x", JobStatus.RUNNING)]
    assert jobs.choose([*ended, *others], "s3://b/study") == (None, None, f"{name}-3")
    for status in (JobStatus.PENDING, JobStatus.RUNNING):
        running = job(f"{name}-3", status, "python -m x")
        chosen = jobs.choose([running, *ended, *others], "s3://b/study")
        assert chosen == (f"{name}-3", "python -m x", f"{name}-4")
