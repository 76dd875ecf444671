"""What `headrace serve` runs, with a hash engine (see `hash_engine.py`) in place of a model's."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import uvloop
from api_house import EOS, TEMPLATE, byte_tokenizer

from headrace.api.http import bind
from headrace.api.service import Service
from headrace.cli.errors import clear_errors
from headrace.config import EngineOptions
from headrace.store import ModelFiles

HASH_ENGINE = Path(__file__).parents[1] / "worker" / "hash_engine.py"


def main(drain_timeout_s: float) -> None:
    with tempfile.TemporaryDirectory() as directory, clear_errors():
        tokenizer = Path(directory) / "tokenizer.json"
        byte_tokenizer()._backend.save(str(tokenizer))
        files = ModelFiles(
            name="hash",
            directory=Path(directory),
            config={"model_type": "hash", "eos_token_id": EOS},
            generation_config={},
            tokenizer_config={},
            weights=(),
            tensors={},
            tokenizer=tokenizer,
            chat_template=TEMPLATE,
            revision="0",
        )
        service = Service(
            files,
            EngineOptions(directory=directory, served_name="hash"),
            bind("127.0.0.1", 0),
            drain_timeout_s=drain_timeout_s,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            engine_command=(sys.executable, str(HASH_ENGINE)),
        )
        uvloop.run(service.run())


main(float(sys.argv[1]))
