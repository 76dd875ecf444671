"""How a driver talks with the comparison: one JSON object a line, in on stdin, out on a pipe of its own.

A driver owns one engine and knows only how to run it: token ids in, how many tokens out, seconds taken. What
is compared, and how often, is the caller's. Peers print freely to stdout, so answers go to the descriptor
that `--answers` names. This file is imported inside peers' environments and needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], int]
"""Greedy continuation of each prompt by so many tokens, whatever they are; returns how many came."""


def arguments() -> argparse.Namespace:
    """What every driver is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, required=True, help="descriptor that takes the answers")
    parser.add_argument("--directory", required=True, help="the model in Hugging Face layout")
    parser.add_argument("--gguf", required=True, help="the file it came from")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--precision", required=True, choices=["bf16", "int8", "4-bit"])
    return parser.parse_args()


def serve(answers: int, generate: Generate) -> None:
    """Answer each line of stdin until it ends."""
    with os.fdopen(answers, "w", buffering=1) as out:
        for line in sys.stdin:
            work = json.loads(line)
            began = time.perf_counter()
            tokens = generate(work["prompts"], work["output_tokens"])
            seconds = time.perf_counter() - began
            out.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
