"""A process goes on when nobody reads its output, and ends when torchrun does."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT

# Writes by every way there is, names a file that it opens, and ends with the code of a run that was asked to leave.
WRITING = """
import os, sys
import training.startup
from training.process import outlive_readers
outlive_readers()
with open(sys.argv[1], "w") as file:
    for number in range(3000):
        print("line", number, flush=number % 7 == 0)
        sys.stderr.write(f"{number}\\n")
    os.write(1, b"by a library")
    print("of a child", file=sys.stderr, flush=True)
    if os.fork() == 0:
        print("by a data loading process", flush=True)
        os._exit(0)
    os.wait()
    file.write("done")
sys.stdout.flush(), sys.stderr.flush()
os._exit(75)
"""


def bash(line, *arguments):
    command = ["bash", "-c", line, "bash", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", ["", "-u"])
@pytest.mark.parametrize("output", [
    "1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "| head -1", "2> >(head -1)", "2>&1 | head -1",
])
def test_output_that_nobody_reads_is_dropped(tmp_path, options, output):
    line = f'"$1" {options} -c "$2" "$3" {output}; exit ${{PIPESTATUS[0]}}'
    done = bash(line, sys.executable, WRITING, tmp_path / "file")
    assert done.returncode == 75, done.stderr
    assert "Error" not in done.stderr and (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_output_that_a_full_disk_does_not_take_is_dropped(options):
    script = (
        "import sys, training.process as p; p.outlive_readers(); "
        "[print('x' * 5000, file=f, flush=True) for f in (sys.stdout, sys.stderr)]; sys.exit(75)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *options, "-c", script], cwd=ROOT, stdout=full, stderr=full)
    assert done.returncode == 75


def test_output_that_is_read_is_whole():
    done = bash('"$1" -c "$2" /dev/null', sys.executable, WRITING)
    lines = [f"line {number}" for number in range(3000)]
    assert sorted(done.stdout.replace("by a library", "").splitlines()) == sorted([*lines, "by a data loading process"])
    assert done.stderr == "".join(f"{number}\n" for number in range(3000)) + "of a child\n"


def test_a_terminal_that_was_closed():
    ours, theirs = os.openpty()
    script = (
        "import sys, time\nfrom training.process import outlive_readers\noutlive_readers()\n"
        "print('on', flush=True)\nsys.stdin.readline()\nprint('off', flush=True)\nsys.exit(75)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert os.read(ours, 2) == b"on"
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 75


def test_a_full_disk_is_still_told():
    done = bash('"$1" -c "$2" /dev/null > /dev/full', sys.executable, WRITING)
    assert done.returncode == 1 and "No space left on device" in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "--help 2>&-"])
def test_help_of_which_only_the_beginning_is_read(arguments):
    done = bash(f'"$1" main.py {arguments} | head -1; exit ${{PIPESTATUS[0]}}', sys.executable)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


# Starts a process that imports training.startup and sleeps.
LAUNCHER = """
import subprocess, sys, time
script = "import training.startup, time; print('up', flush=True); time.sleep(9)"
child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(9)
"""


def runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this")
@pytest.mark.parametrize("launcher,ends", [({"TORCHELASTIC_RUN_ID": "none"}, True), ({}, False)])
def test_a_process_ends_with_torchrun_but_not_with_a_shell(launcher, ends):
    parent = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, **launcher})
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (5 if ends else 0.5)
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs(child) is not ends
    if not ends:
        os.kill(child, signal.SIGKILL)
