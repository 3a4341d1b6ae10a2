"""A command ends with its exit code and without a traceback, whenever Ctrl-C is pressed."""

import signal
import subprocess
import sys
import time

import pytest
from processes import TRAIN, Driver

from sampimp.sweeps.door import INTERRUPTED

COMMAND = """
import atexit, os, signal, sys, threading, time
from sampimp.sweeps.door import run_door

def main(arguments):
    atexit.register(time.sleep, 0.3)
    threading.Thread(target=time.sleep, args=(0.3,)).start()  # the interpreter waits for it
    try:
        print("begun", flush=True)
        {body}
        print("done", flush=True)
        return 7
    except KeyboardInterrupt:
        print("answered", flush=True)
        return 130

run_door(main)
"""


@pytest.fixture(autouse=True)
def handle_ctrl_c():
    """Let child processes handle Ctrl-C, also if the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(body, **options):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def press(process, pause):
    """Press Ctrl-C again and again until the process is gone; return how often."""
    count = 0
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        count += 1
        time.sleep(pause)
    return count


@pytest.mark.parametrize("pause", [0, 0.001, 0.02])
def test_ctrl_c_is_ignored_once_the_exit_code_is_known(pause):
    for delay in (0, 0.01, 0.05, 0.2):
        process = start("pass")
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines == ["begun\n", "done\n"]
        time.sleep(delay)
        assert press(process, pause) > 3
        # Just before its exit code is known, the process is interrupted like any other.
        assert (process.returncode, process.stdout.read()) in (
            (7, ""),
            (130, "answered\n"),
            (130, f"{INTERRUPTED}\n"),
        )


@pytest.mark.parametrize("pause", [0, 0.001, 0.02])
def test_repeated_ctrl_c_counts_once(pause):
    process = start("time.sleep(60)")
    assert process.stdout.readline() == "begun\n"
    assert press(process, pause) > 3
    assert (process.returncode, process.stdout.read()) == (130, "answered\n")


def test_a_closed_pipe_ends_a_command_without_a_traceback():
    process = start("print('x' * 10**6, flush=True)")
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    assert process.wait() == 1


def test_ctrl_c_counts_again_after_a_swallowed_one():
    swallow = "from sampimp.sweeps import door; door.PAUSE = 0.2\n        "
    swallow += "try:\n            print('ready', flush=True)\n            time.sleep(60)\n"
    swallow += "        except KeyboardInterrupt:\n"
    swallow += "            print('swallowed', flush=True)\n        time.sleep(60)"
    process = start(swallow)
    assert [process.stdout.readline(), process.stdout.readline()] == ["begun\n", "ready\n"]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "swallowed\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert (process.wait(), process.stdout.read()) == (130, "answered\n")


def test_a_command_in_the_background_is_not_interrupted():
    process = start(
        "time.sleep(1)", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    assert process.stdout.readline() == "begun\n"
    press(process, 0.02)
    assert (process.returncode, process.stdout.read()) == (7, "done\n")


@pytest.mark.parametrize("in_background", [False, True])
def test_sigterm_ends_a_command_as_ctrl_c_does(in_background):
    ignore = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if in_background else None
    process = start("time.sleep(60)", preexec_fn=ignore)
    assert process.stdout.readline() == "begun\n"
    while process.poll() is None:
        process.terminate()
        time.sleep(0.02)
    assert (process.returncode, process.stdout.read()) == (143, "answered\n")


def test_a_command_that_does_not_end_after_sigterm_is_ended():
    """The end of a command may wait for a server that is gone."""
    wait = "from sampimp.sweeps import door; door.GRACE = 0.5\n        "
    wait += "try:\n            print('ready', flush=True)\n            time.sleep(60)\n"
    wait += "        finally:\n            time.sleep(60)"
    process = start(wait)
    assert [process.stdout.readline(), process.stdout.readline()] == ["begun\n", "ready\n"]
    began = time.monotonic()
    process.terminate()
    assert (process.wait(), process.stdout.read()) == (143, "")
    assert 0.5 <= time.monotonic() - began < 30


def test_ctrl_c_at_the_end_of_a_study_prints_no_traceback(finished):
    """Nothing is left to train: the study ends once it has started Ray, and stops Ray."""
    driver = Driver(finished.out, finished.arguments, door=TRAIN)
    try:
        lines = []
        while not lines or "are committed" not in lines[-1]:
            lines.append(driver.process.stdout.readline())
            assert lines[-1], lines
        pressed = 0
        while driver.process.poll() is None:
            driver.interrupt()
            pressed += 1
            time.sleep(0.005)
        text = "".join(lines) + driver.process.stdout.read()
        assert pressed > 3
        assert driver.process.returncode in (0, 130), text
        assert "Traceback" not in text
        assert "Exception" not in text
        assert text.splitlines()[-1] in (lines[-1].rstrip(), INTERRUPTED)
    finally:
        driver.close()
