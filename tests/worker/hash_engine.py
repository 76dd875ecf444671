"""An engine process as `headrace.worker.main` runs one, with a hash engine in place of a model.

Options, fields of `EngineShape`, come on standard input, or in HASH_ENGINE where that is taken by the options
of a real engine. `"fail"` among them says how it is to go wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import EngineShape

from headrace.worker import report_start_failure, serve
from headrace.world import real_world
from headrace.world.launcher import die_with_parent


def main(address: str, parent: str) -> None:
    die_with_parent(int(parent))
    options = json.loads(os.environ.get("HASH_ENGINE") or sys.stdin.read())
    fail = options.pop("fail", None)
    print("loading a model of hashes", flush=True)
    if fail == "refuse":
        uvloop.run(report_start_failure(real_world(), address, "the hashes are broken"))
        sys.exit(1)
    if fail == "crash":
        raise RuntimeError("no hashes here")
    if fail == "hang":
        time.sleep(60)
    engine, info = EngineShape(**options).build()
    uvloop.run(serve(real_world(), address, engine, info))


main(*sys.argv[1:])
