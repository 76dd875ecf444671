"""One engine under comparison: its driver process, held still while another is measured.

In: prompts and how many tokens to add. Out: seconds. The process is stopped (SIGSTOP) whenever it is not its
turn, so that pools that spin while idle cost the others nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

DRIVERS = Path(__file__).parent / "drivers"


class DriverError(Exception):
    """A driver ended before it answered; the message ends with what it printed."""


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """What a driver is started with; see `drivers/protocol.py`."""

    directory: Path
    gguf: Path
    threads: int
    max_model_len: int
    max_num_seqs: int
    precision: str


class Session:
    """A started driver. Use as a context; the process ends with it."""

    def __init__(
        self, python: Path, driver: str, options: DriverOptions, environment: dict[str, str]
    ) -> None:
        self._log = os.fdopen(os.memfd_create(driver), "w+b")
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers)
        self._process = subprocess.Popen(
            [
                *(python, DRIVERS / driver, "--answers", str(theirs)),
                *("--directory", options.directory, "--gguf", options.gguf),
                *("--threads", str(options.threads), "--precision", options.precision),
                *("--max-model-len", str(options.max_model_len)),
                *("--max-num-seqs", str(options.max_num_seqs)),
            ],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs],
            text=True,
            bufsize=1,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()
        self._log.close()

    def generate(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Seconds that the engine takes to add `output_tokens` to every prompt.

        Raises DriverError when it ends, or adds another number of tokens.
        """
        assert self._process.stdin is not None
        try:
            self._signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps({"prompts": prompts, "output_tokens": output_tokens}) + "\n")
            answer = self._answers.readline()
        except (BrokenPipeError, ProcessLookupError):
            answer = ""
        if not answer:
            raise DriverError(f"ended with {self._process.wait()}\n{self._tail()}")
        self._signal(signal.SIGSTOP)
        said = json.loads(answer)
        if said["tokens"] != len(prompts) * output_tokens:
            raise DriverError(f"gave {said['tokens']} tokens of {len(prompts)} × {output_tokens}")
        return float(said["seconds"])

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]
