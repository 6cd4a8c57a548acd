import os
import signal
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from training import signals
from training.advice import with_advice
from training.signals import OutOfMemoryFault, SignalHandler, fault_of


def told(error):
    """What a user reads of a fault."""
    return with_advice(fault_of(error))


@pytest.mark.parametrize("error,line", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
     "a data loading process was killed, as happens when memory runs out (DataLoader worker (pid 7) is killed by "
     "signal: Killed.); give fewer --num_workers or more memory; what was saved is intact, resume with "
     "--auto_resume and the run's --output_dir"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
     "out of memory (CUDA out of memory. Tried to allocate 2 GiB.); lower --batch_size and raise --update_freq by "
     "as much, which trains the same, or pass --grad_checkpointing"),
    (RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set"),
     "this network cannot be trained deterministically here (grid_sampler_2d_backward_cuda does not have a "
     "deterministic implementation, but you set); leave out --deterministic"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory (DefaultCPUAllocator: can't allocate memory: you tried); lower --batch_size and raise "
     "--update_freq by as much, which trains the same, or pass --grad_checkpointing"),
    (OSError(28, "No space left on device"),
     "No space left on device in the output folder; what was saved is intact, resume with --auto_resume and the "
     "run's --output_dir"),
    (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."),
     "another process of the run ended, or did not answer in time (Failed to recv, got 0 bytes.); --dist_timeout says "
     "how long a process waits for another; what was saved is intact, resume with --auto_resume and the "
     "run's --output_dir"),
    (OSError(28, "No space left on device", "log.txt"),
     "No space left on device: log.txt; what was saved is intact, resume with --auto_resume and the "
     "run's --output_dir"),
])
def test_faults_of_the_machine_are_told_in_words(error, line):
    assert told(error) == line and fault_of(error).exit_code == 1


def test_memory_of_a_gpu_is_no_memory_of_the_host():
    """Triton, and the thread that copies batches to a GPU, use words of the host's memory."""
    triton = RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block")
    assert fault_of(triton) is None
    copying = RuntimeError("Caught OutOfMemoryError in pin memory thread for device 0.\nOriginal Traceback (most "
                           "recent call last):\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n")
    assert isinstance(fault_of(copying), OutOfMemoryFault)


OF_WORKER = "Caught RuntimeError in data loading process 7.\nOriginal Traceback (most recent call last):\n"


@pytest.mark.parametrize("error,line", [
    (MemoryError("out of memory while reading a.png"),
     "out of memory (out of memory while reading a.png); give fewer --num_workers, a smaller --batch_size, or more "
     "memory"),
    (MemoryError(), "out of memory (MemoryError); give fewer --num_workers"),
    (MemoryError(f"{OF_WORKER}  File x\nMemoryError: no room\n"), "out of memory (MemoryError: no room); give fewer"),
    (OSError(12, "Cannot allocate memory"), "out of memory ([Errno 12] Cannot allocate memory); give fewer"),
    (RuntimeError(f"{OF_WORKER}RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space\n"),
     "shared memory, /dev/shm, is too small or full (RuntimeError: unable to allocate shared memory(shm) for file "
     "</torch_1>: No space); make it larger, by docker run --shm-size 8g for example, or give fewer --num_workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory. Please try to raise your shared memory limit."),
     "shared memory, /dev/shm, is too small or full (DataLoader worker (pid 7) is killed by signal: Bus error."),
    (OSError(24, "Too many open files"), "too many open files ([Errno 24] Too many open files); raise the limit, by "
                                         "ulimit -n 65536 for example, or give fewer --num_workers"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "too many open files"),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
     "too many open files"),
    (RuntimeError("unable to mmap 1024 bytes from file </torch_1_2>: Cannot allocate memory (12)"), "shared memory"),
    (RuntimeError(f"{OF_WORKER}OSError: AF_UNIX path too long\n"), "the path of the temporary folder /"),
])
def test_what_a_process_has_too_little_of_is_named(error, line):
    said = told(error)
    assert said.startswith(line) and said.endswith("resume with --auto_resume and the run's --output_dir")


@pytest.mark.parametrize("error", [
    RuntimeError("[gloo/transport/tcp/pair.cc:530] Read error: reset by peer"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    RuntimeError("Application timeout caused pair closure"),
])
def test_a_peer_that_is_gone(error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "did not answer in time" in told(error) and "--dist_timeout" in told(error)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fault_of(error) is None


@pytest.mark.parametrize("error", [
    RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(2, "no", "x"),
    OSError(2, "No such file or directory", "/data/gloomy/x"),
])
def test_what_may_be_the_code_is_left_to_a_traceback(error):
    assert fault_of(error) is None


def run_python(script):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_bug_ends_the_process_too():
    """With its traceback, and whatever still runs: the other processes of the run wait for this one."""
    done = run_python(
        "import threading\n"
        "from training import signals\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "signals.run_and_exit(lambda: 1 / 0)"
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2, signals.EXIT_RESUME])
def test_a_fault_ends_the_process_without_waiting_for_others(code):
    """Python would wait for this thread for ever; only after a fault must it not."""
    done = run_python(
        "import threading\n"
        "from training import signals\n"
        f"threading.Thread(target=threading.Event().wait, daemon={code == 0}).start()\n"
        f"print('said'); signals.exit_with({code})"
    )
    assert (done.returncode, done.stdout) == (code, "said\n")


@pytest.mark.slow
def test_a_run_that_is_over_does_not_wait_for_a_stopped_process():
    """Python would: it asks a data loading process to end, which it cannot while it is stopped."""
    done = run_python(
        "import multiprocessing, os, signal, time\n"
        "from training import signals\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,), daemon=True)\n"
        "worker.start()\n"
        "os.kill(worker.pid, signal.SIGSTOP)\n"
        "signals.exit_with(0)"
    )
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("number", SignalHandler.SIGNALS)
def test_signals_are_noted_and_handed_back(number):
    before = signal.getsignal(number)
    with SignalHandler().installed() as handler:
        assert handler.signal is None
        os.kill(os.getpid(), number)
        assert handler.signal == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_is_ignored_still():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler().installed() as handler:
            os.kill(os.getpid(), signal.SIGHUP)
            assert handler.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("first", SignalHandler.SIGNALS)
@pytest.mark.parametrize("kept,said", [("None", ""), ("lambda: 'the last one is x'", "; the last one is x")])
def test_an_interrupt_after_any_signal_ends_the_run_at_once(first, kept, said):
    done = run_python(
        "import os, signal\n"
        "from training.signals import SignalHandler\n"
        "with SignalHandler().installed() as handler:\n"
        f"    handler.kept = {kept}\n"
        f"    os.kill(os.getpid(), {int(first)})\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "print('never said')"
    )
    assert done.returncode == 128 + signal.SIGINT and done.stdout == ""
    assert done.stderr == f"\nended at once{said}\n"
