"""Comparison of formulas by math-verify, in a process of its own, because it may never return.

`9^{9^{9^9}}` keeps it busy for ever inside one C call, where no thread and no Python signal handler can stop it. The
child runs under limits of the kernel (CPU time, memory), so that it ends by itself even if we are gone.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from thinkimg.answers.formulas import Verdict, compare_texts, plain_formula
from thinkimg.answers.text import strip_lead_in
from thinkimg.environment import child_environment
from thinkimg.errors import UserError
from thinkimg.rewards.maths_worker import SECONDS

WORKER = Path(__file__).with_name("maths_worker.py")
STOPPED = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)  # a person's, or the kernel's without memory


def verify_formulas(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
    """Return the verdict on each (answer, right answer). No process is started where the texts decide."""
    pairs = dict.fromkeys(pairs)
    verdicts = {pair: verdict for pair in pairs if (verdict := compare_texts(*pair))}
    undecided = [pair for pair in pairs if pair not in verdicts]
    if undecided:
        with Checker() as checker:
            verdicts |= {pair: checker.ask(*pair) for pair in undecided}
    return verdicts


class Checker:
    """Child process, started with the first question and again after a formula killed it. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._forget()

    def ask(self, answer: str, right: str) -> Verdict:
        """Return the verdict on an answer.

        Raises UserError if the child was ended from outside, RuntimeError if it ended with an error of its own.
        """
        process = self._process or self._start()
        assert process.stdin and process.stdout
        with suppress(BrokenPipeError):  # it has ended: its status says why
            process.stdin.write(json.dumps([plain_formula(right), plain_formula(strip_lead_in(answer))]) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if reply:
            return Verdict(*json.loads(reply))
        status = self._forget()
        if status == -signal.SIGPROF:
            return Verdict(False, f"Comparing the formulas took more than {SECONDS:g} s of CPU time.")
        if -status in STOPPED:
            raise UserError(
                f"The process that compares formulas was ended from outside, by signal {-status}.",
                hint="Run this again; if the machine is short of memory, set where.workers lower.",
            )
        if status < 0:
            return Verdict(False, f"Comparing the formulas ended with signal {-status}.")
        raise RuntimeError(
            f"the process that compares formulas ended with status {status}; its standard error says why"
        )

    def _start(self) -> subprocess.Popen[str]:
        # -P: the directory of the script holds format.py and others, which must not shadow a library's modules.
        command = [sys.executable, "-P", str(WORKER)]
        environment = child_environment("maths", os.environ)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # a terminal sends Ctrl-C to all of a session, and this would be a traceback
        )
        assert self._process.stdout
        if not self._process.stdout.readline():
            raise RuntimeError(f"{' '.join(command)} did not start (status {self._forget()})")
        return self._process

    def _forget(self) -> int:
        process, self._process = self._process, None
        assert process
        with suppress(BrokenPipeError), process:  # closing the pipe sends what the dead child has not read
            process.wait()
        return process.returncode
