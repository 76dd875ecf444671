"""Runs clients that others wrote against a server of ours: the official `openai` client, and guidellm's load.

    python tests/clients/check_clients.py ENVIRONMENT

ENVIRONMENT is a virtual environment with `requirements.txt`, apart from ours; `make check-clients` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from served import Served

from headrace.store import pull

REQUESTS = 24
STREAMS = 4
TIMEOUT_S = 300


def check_openai(binaries: Path, url: str) -> None:
    calls = Path(__file__).with_name("openai_calls.py")
    subprocess.run([binaries / "python", calls, f"{url}/v1"], check=True, timeout=TIMEOUT_S)


def check_guidellm(binaries: Path, url: str, model: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [
            binaries / "guidellm",
            "run",
            f"--backend=kind=openai_http,target={url}",
            f"--profile=kind=concurrent,streams={STREAMS}",
            f"--constraint=kind=max_requests,count={REQUESTS}",
            f"--tokenizer=kind=huggingface_auto,model={model}",
            "--data=kind=synthetic_text,prompt_tokens=64,output_tokens=16",
            f"--output=kind=json,path={report}",
            "--disable-console",
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=directory, env=environment)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    good, bad = totals["successful"], totals["errored"]
    if good < REQUESTS or bad:
        raise SystemExit(f"guidellm: {good} of {REQUESTS} requests were answered, {bad} failed")
    rate = benchmark["metrics"]["output_tokens_per_second"]["successful"]["mean"]
    print(f"guidellm: {good} requests answered, {rate:.0f} output tokens per second")


def main() -> None:
    binaries = Path(sys.argv[1]).absolute() / "bin"
    model = pull("smollm2-135m")
    with Served(model, "--kv-cache-memory", "128MiB") as server:
        check_openai(binaries, server.url)
        check_guidellm(binaries, server.url, model)
        left = server.wait_quiet()
        if left.get("ended:error"):
            raise SystemExit(f"{left['ended:error']:g} requests ended in an error")


main()
