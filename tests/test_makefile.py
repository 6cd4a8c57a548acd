"""What `make` says before it installs, and after the quick start."""
import os
import pty
import shutil
import subprocess

import pytest

from helpers import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def quickstart(tmp_path):
    """Runs `make quickstart` with a Python and a pip that do nothing; returns the lines of both, and pip's words."""
    log, bin_folder = tmp_path / "pip.log", tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, body in (("python", "exit 0"), ("pip", f'echo "$*" >> {log}; echo "pip downloads"')):
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    command = ["make", "quickstart", f"VENV={tmp_path / 'venv'}", f"QUICKSTART_OUTPUT={tmp_path / 'out'}"]
    # As from a shell: `make test` hands its own flags down, and a make below another says which folder it enters.
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}

    def run(stdout):
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, check=True)
        return done, log.read_text()

    return run


def test_the_size_of_what_is_installed_is_said_first_and_what_to_activate_last(quickstart, tmp_path):
    done, words = quickstart(subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    assert "minutes, and 6 GB" in lines[0] and lines.index("pip downloads") > 0
    assert f"{tmp_path / 'venv'}/bin/python scripts/predict.py docs/church.jpg" in lines
    assert (ROOT / "docs" / "church.jpg").is_file()
    assert lines[-1].endswith(f". {tmp_path / 'venv'}/bin/activate && python main.py --help")
    assert "--quiet" in words


def test_a_terminal_sees_progress(quickstart):
    reader, writer = pty.openpty()
    _, words = quickstart(writer)
    os.close(writer)
    os.close(reader)
    assert "-r requirements.txt" in words and "--quiet" not in words
