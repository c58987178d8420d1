"""Fresh processes, cheaply: one clean process imports everything once and forks a child for each job.

Importing torch, transformers and lm-eval costs seconds; a fork costs milliseconds and is as fresh, since the clean
process never touches a model. Jobs and outcomes are JSON lines; results travel through files.

    Workers (in the caller)  --{"job", "call", "arguments", "threads", "log"}-->  the clean process  --fork-->  child
                             <--{"job", "started"} and {"job", "exit"}--

All die with the caller: the clean process ends when its input does, and its children are told to end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from effbench.errors import WorkerError, is_out_of_memory

OUT_OF_MEMORY = 77
"""The exit code of a child that ran out of memory and could say so."""
IMPORTS = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "lm_eval",
    "lm_eval.tasks",
    "effbench.jobs.applying",
    "effbench.jobs.scoring",
    "effbench.jobs.timing",
)


class Workers:
    """Where jobs run: submit, collect, cancel.

    A job is a function `module:name` and its JSON arguments; it is over when its process has ended.
    Raises `WorkerError` where the clean process cannot be started or dies.
    """

    def __init__(self) -> None:
        environment = dict(os.environ)
        environment.update(
            OMP_NUM_THREADS="1",  # no thread pool may exist before a fork
            OMP_WAIT_POLICY="PASSIVE",  # a waiting worker must not burn the other's core
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            TRANSFORMERS_VERBOSITY="error",
            HF_HUB_DISABLE_TELEMETRY="1",
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "effbench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the caller, who then ends the workers
        )
        self._next = 0
        self._pending = b""
        self._logs: dict[int, Path] = {}
        self.started: dict[int, float] = {}
        """When each job began to run, by `time.monotonic`; one that still waits is not there."""

    def submit(self, call: str, arguments: dict[str, Any], *, threads: int, log: Path) -> int:
        """Start a job; its number. What it prints goes to `log`."""
        self._next += 1
        self._logs[self._next] = log
        self._send({"job": self._next, "call": call, "arguments": arguments, "threads": threads, "log": str(log)})
        return self._next

    def collect(self, timeout: float | None = None) -> tuple[int, int] | None:
        """The number and exit code of a job that has ended, negative for a signal; `None` if none has within the
        timeout, or a job has only begun."""
        assert self._process.stdout is not None
        # read unbuffered: two answers that come together must not leave one where select does not see it
        if b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout)
            if not ready:
                return None
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise WorkerError(f"the worker process ended on its own (exit code {self._process.wait()})")
            self._pending += data
        line, separator, rest = self._pending.partition(b"\n")
        if not separator:
            return None
        self._pending = rest
        answer = json.loads(line)
        if "started" in answer:
            self.started[answer["job"]] = time.monotonic()
            return None
        return answer["job"], answer["exit"]

    def cancel(self, job: int) -> None:
        """End a job now; it is then collected with a negative exit code."""
        self._send({"kill": job})

    def log_tail(self, job: int, lines: int = 1) -> str:
        """The last lines that a job printed."""
        path = self._logs[job]
        text = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
        return "\n".join(text[-lines:])

    def close(self) -> None:
        """End all jobs and the clean process."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(f"the worker process is gone (exit code {self._process.poll()})") from None


def _serve() -> None:
    """The clean process: import, then fork on request until the input ends."""
    _die_with_parent()
    for name in IMPORTS:
        import_module(name)
    gc.collect()
    gc.freeze()  # what is imported never dies: a child's collections need not walk it, and its pages stay shared
    # a library may have left an idle thread, of which Python 3.12 warns at a fork; no child needs it
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    children: dict[int, int] = {}
    pending = b""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(children)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _answer(json.loads(line), children)


def _answer(message: dict[str, Any], children: dict[int, int]) -> None:
    if "kill" in message:
        for child, job in children.items():
            if job == message["kill"]:
                os.kill(child, signal.SIGKILL)
        return
    child = os.fork()
    if child == 0:
        _child(message)
    children[child] = message["job"]
    os.write(1, json.dumps({"job": message["job"], "started": True}).encode() + b"\n")


def _reap(children: dict[int, int]) -> None:
    """Report every child that has ended."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        line = json.dumps({"job": children.pop(child), "exit": os.waitstatus_to_exitcode(status)})
        os.write(1, line.encode() + b"\n")


def _child(message: dict[str, Any]) -> None:
    """Run one job and leave without unwinding into the clean process's loop."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _tune_allocator()
        _die_with_parent()
        import torch

        torch.set_num_threads(message["threads"])
        module, _, name = message["call"].partition(":")
        getattr(import_module(module), name)(**message["arguments"])
        code = 0
    except BaseException as error:
        code = OUT_OF_MEMORY if is_out_of_memory(error) else 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    """Linux: be killed when the process that started this one ends; elsewhere the closed input has to do."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _tune_allocator() -> None:
    """glibc: keep freed memory instead of returning it after each tensor; CPU passes are several times faster."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    _serve()
