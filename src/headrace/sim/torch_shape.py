"""Engines of a simulated cluster that run torch on a tiny model with random weights.

In: the shape of an engine. Out: the engine that production builds, batch-invariant, with steps that take
virtual time; and what a request produces alone on a fresh one. A hash shows every wrong block; this shows
that what hashes prove holds for the executor, the pages and the sampler that serve. The one part of the
simulation that imports torch.
"""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headrace.config import EngineOptions
from headrace.engine import Engine
from headrace.engine.plan import StepPlan, StepResult
from headrace.execution.build import BuiltEngine, build_engine
from headrace.protocol.handoff import Computed, Leg
from headrace.protocol.messages import EngineInfo
from headrace.protocol.requests import GenerateRequest, TokenLogprobs
from headrace.sim.hash_executor import SimExecutor
from headrace.sim.hash_model import Expected
from headrace.sim.shape import KEY, EngineShape

LAYERS, HIDDEN, INNER, HEAD = 2, 32, 48, 16
TILE = 16
"""Positions of a block take as much memory as the next multiple of this: kernels keep them in tiles."""


class TorchSimExecutor(SimExecutor):
    """A built engine's executor, whose results come when the modelled time of their step has passed."""

    depth = 1

    def __init__(self, built: BuiltEngine, step_s: float, token_s: float) -> None:
        self.info = built.info
        self.step_s, self.token_s, self.steps = step_s, token_s, 0
        self._built = built

    @property
    def block_bytes(self) -> int:
        return self.info.block_bytes

    def memory(self) -> memoryview:
        if self._built.shared_kv is None:
            raise RuntimeError("the engine was built without memory that others can open")
        return self._built.shared_kv.buffer[: self.info.num_blocks * self.info.block_bytes]

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        duration_s = self.step_s + self.token_s * plan.tokens
        result = replace(self.run(plan), kernel_s=duration_s)  # the real time differs from run to run
        loop.call_later(duration_s, lambda: None if future.done() else future.set_result(result))
        return future

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan now, in no virtual time."""
        self.steps += 1
        done: asyncio.Future[StepResult] = self._built.engine.executor.submit(plan)
        return done.result()

    def close(self) -> None:
        self._built.engine.executor.close()


@dataclass(frozen=True)
class TorchShape(EngineShape):
    """As `EngineShape`, computing a Llama of two tiny layers."""

    def build(self) -> Engine:
        return self._build(prefix_caching=True)

    def _build(self, *, prefix_caching: bool) -> Engine:
        options = EngineOptions(
            directory=str(_directory(self.vocab_size, self.max_model_len, min(self.eos_token_ids))),
            served_name="tiny",
            dtype="float32",
            threads=1,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            kv_cache_memory=self.num_blocks * LAYERS * 2 * HEAD * 4 * -(-self.block_size // TILE) * TILE,
            block_size=self.block_size,
            prefix_caching=prefix_caching,
            batch_invariant=True,
            shared_kv=True,
            cache_key=KEY,
        )
        built = build_engine(options)
        return Engine(built.engine.scheduler, TorchSimExecutor(built, self.step_s, self.token_s))

    def info(self, engine: Engine) -> EngineInfo:
        return _executor(engine).info

    def expected(self, request: GenerateRequest, index: int) -> Expected:
        return _alone(self, _Named(request)).samples[index]

    def holds(self, blocks: memoryview, request: GenerateRequest, tokens: int) -> bool:
        whole = tokens // self.block_size * len(blocks) // -(-tokens // self.block_size)
        return bytes(blocks[:whole]) == _alone(self, _Named(request)).blocks[:whole]


@dataclass(frozen=True, slots=True)
class _Alone:
    samples: list[Expected]
    blocks: bytes
    """What a prefill worker holds of the prompt."""


class _Named:
    """A request as a key: those of one name and prompt are the same."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self._key = (request.request_id, tuple(request.prompt), request.sampling.seed)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self._key == other._key


@functools.lru_cache(maxsize=1000)
def _alone(shape: TorchShape, named: _Named) -> _Alone:
    """Run a request with nothing beside it on an engine that caches nothing."""
    request, engine = named.request, _fresh(shape)
    engine.add(request)
    tokens: list[list[int]] = [[] for _ in range(request.sampling.n)]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in tokens]
    told: list[TokenLogprobs] | None = None
    while engine.has_work:
        for output in _step(engine):
            tokens[output.index] += output.tokens
            logprobs[output.index] += output.logprobs or []
            told = output.prompt_logprobs if output.prompt_logprobs is not None else told
    wanted = request.sampling.logprobs is not None
    samples = [
        Expected(tokens[i], logprobs[i] if wanted else None, told if i == 0 else None, [])
        for i in range(len(tokens))
    ]
    return _Alone(samples, _exported(engine, request))


def _exported(engine: Engine, request: GenerateRequest) -> bytes:
    engine.add(request, leg=Leg.EXPORT)
    places: list[int] = []
    while engine.has_work:
        _step(engine)
        for event in engine.take_handoffs():
            if isinstance(event, Computed):
                places += [block for span in event.spans for block in span.blocks]
    executor = _executor(engine)
    memory, size = executor.memory(), executor.block_bytes
    found = b"".join(bytes(memory[block * size : (block + 1) * size]) for block in places)
    engine.release(request.request_id)
    return found


def _step(engine: Engine) -> list[Any]:
    plan = engine.scheduler.schedule()
    if plan is not None:
        engine.scheduler.commit(plan, _executor(engine).run(plan))
    return engine.scheduler.take_outputs()


@functools.cache
def _fresh(shape: TorchShape) -> Engine:
    return shape._build(prefix_caching=False)


def _executor(engine: Engine) -> TorchSimExecutor:
    if not isinstance(engine.executor, TorchSimExecutor):
        raise TypeError(f"{type(engine.executor).__name__} is no executor of a TorchShape")
    return engine.executor


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    """For models, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="headrace-sim-")


@functools.cache
def _directory(vocab_size: int, positions: int, eos_token_id: int) -> Path:
    """A model's directory as `build_engine` reads it."""
    directory = Path(_kept().name) / f"{vocab_size}-{positions}-{eos_token_id}"
    directory.mkdir()
    shapes = {
        "model.embed_tokens": (vocab_size, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (vocab_size, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HEAD, HIDDEN),
            "self_attn.v_proj": (HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": 1,
        "num_hidden_layers": LAYERS,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "eos_token_id": eos_token_id,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return directory
