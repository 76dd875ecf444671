"""Thirty prompts, every way the scheduler could run them: identical bits of logits, identical tokens."""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from random_models import make

from headrace.engine import Engine, GroupSpec, KVCache, Scheduler, SchedulerConfig
from headrace.execution import runner
from headrace.execution.sampler import sample_rows
from headrace.execution.selftest import NotBatchInvariant, check_batch_invariance
from headrace.kernels.base import Kernels, Program
from headrace.kernels.native import NativeKernels
from headrace.kernels.reference import TorchKernels
from headrace.models.decoder import Decoder
from headrace.models.kv_groups import kv_groups
from headrace.models.loader import load_decoder
from headrace.protocol.requests import GenerateRequest, SamplingParams

PROMPTS = 30
MAX_LEN = 120
BLOCK = 16


@dataclass(frozen=True)
class Run:
    """What came of one way of running: tokens, and a digest of the raw logits behind each."""

    tokens: dict[str, list[int]]
    logits: dict[tuple[int, int], bytes]
    preemptions: int
    prefix_hits: int


def prompts(vocab_size: int) -> list[list[int]]:
    """Of 1 to 99 tokens; every third begins as its predecessor does, so that prefixes are shared."""
    generator = random.Random(7)
    made: list[list[int]] = []
    for i in range(PROMPTS):
        tokens = [generator.randrange(vocab_size) for _ in range(generator.randint(1, 99))]
        made.append(made[-1][:40] + tokens[:59] if i % 3 == 2 else tokens)
    return made


def requests(vocab_size: int, temperature: float, output: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=str(i),
            prompt=prompt,
            sampling=SamplingParams(
                max_tokens=output, temperature=temperature, top_p=0.95, seed=1000 + i, ignore_eos=True
            ),
        )
        for i, prompt in enumerate(prompts(vocab_size))
    ]


class House:
    """One loaded decoder that can be given engines of any shape."""

    def __init__(self, directory: Path, kernels: Kernels) -> None:
        self.decoder: Decoder = load_decoder(directory, kernels, MAX_LEN)
        self.groups = kv_groups(self.decoder.config)
        self.vocab_size = self.decoder.config.vocab_size

    def attach(self, num_blocks: int) -> None:
        config = self.decoder.config
        pages = self.decoder.kernels.allocate_kv(
            num_blocks, len(self.groups[0].layers), config.kv_heads, config.head_dim, BLOCK
        )
        self.decoder.attach_kv(pages, self.groups, BLOCK)

    def engine(
        self, *, num_blocks: int = 600, budget: int = 512, rows: int = 32, reuse: bool = False
    ) -> Engine:
        self.attach(num_blocks)
        scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=MAX_LEN,
                vocab_size=self.vocab_size,
                max_num_seqs=rows,
                max_num_batched_tokens=budget,
                reuse_prefix=reuse,
            ),
            KVCache(
                num_blocks=num_blocks,
                block_size=BLOCK,
                groups=[GroupSpec(group.window) for group in self.groups],
            ),
        )
        executor = runner.TorchExecutor(
            self.decoder,
            rows=rows,
            groups=len(self.groups),
            max_model_len=MAX_LEN,
            block_size=BLOCK,
            eos_token_ids=frozenset(),
        )
        return Engine(scheduler, executor)


def run(
    engine: Engine,
    waves: list[list[GenerateRequest]],
    monkeypatch: pytest.MonkeyPatch,
    late: list[GenerateRequest] | None = None,
) -> Run:
    """Run the waves one after another; of the last, keep tokens and digests of logits.

    `late` requests join the last wave, one after each of its first steps.
    """
    late = list(late or ())
    logits: dict[tuple[int, int], bytes] = {}

    def recording(samplers, rows, positions):
        for sampler, row, position in zip(samplers, rows, positions, strict=True):
            logits[sampler._seed, position] = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        return sample_rows(samplers, rows, positions)

    monkeypatch.setattr(runner, "sample_rows", recording)
    tokens: dict[str, list[int]] = {}

    async def drive() -> None:
        for wave in waves:
            logits.clear()
            tokens.clear()
            for request in wave:
                engine.add(request)
            while engine.has_work:
                if late and wave is waves[-1]:
                    engine.add(late.pop())
                for output in await engine.step():
                    tokens.setdefault(output.request_id, []).extend(output.tokens)
                    assert output.finish is None or output.finish.error is None
            engine.scheduler.cache.pool.check()
            assert engine.scheduler.cache.pool.held == 0

    asyncio.run(drive())
    counters = engine.scheduler.counters
    return Run(dict(tokens), dict(logits), counters.preemptions, counters.prefix_hits)


def alone(house: House, wanted: list[GenerateRequest], monkeypatch: pytest.MonkeyPatch) -> Run:
    tokens: dict[str, list[int]] = {}
    logits: dict[tuple[int, int], bytes] = {}
    engine = house.engine()
    for request in wanted:
        one = run(engine, [[request]], monkeypatch)
        tokens |= one.tokens
        logits |= one.logits
    return Run(tokens, logits, 0, 0)


def same(expected: Run, got: Run, way: str) -> None:
    assert got.tokens == expected.tokens, way
    assert got.logits == expected.logits, way


def check_every_way(
    house: House, temperature: float, output: int, monkeypatch: pytest.MonkeyPatch, count: int = PROMPTS
) -> None:
    wanted = requests(house.vocab_size, temperature, output)[:count]
    expected = alone(house, wanted, monkeypatch)
    assert len(expected.logits) == len(wanted) * output

    same(expected, run(house.engine(), [wanted], monkeypatch), "all together")
    for chunk in (16, 37):
        engine = house.engine(budget=chunk, rows=8)
        same(expected, run(engine, [wanted], monkeypatch), f"chunks of {chunk}")

    engine = house.engine(reuse=True)
    warm = run(engine, [wanted, wanted], monkeypatch)
    assert warm.prefix_hits > count * 16
    same(expected, warm, "with a warm prefix")

    # Urgent requests arrive one by one and each takes the blocks of others that have begun to decode.
    urgent = [msgspec.structs.replace(request, priority=-i) for i, request in enumerate(wanted) if i % 2]
    tight = run(house.engine(num_blocks=len(house.groups) * 20), [wanted[::2]], monkeypatch, urgent[::-1])
    assert tight.preemptions >= len(urgent) // 2
    same(expected, tight, "after forced preemption")


@pytest.fixture(scope="module")
def real_house(smollm2_dir: Path) -> House:
    return House(smollm2_dir, NativeKernels(dtype=torch.bfloat16, batch_invariant=True, threads=2))


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "seeded"])
def test_smollm2_in_bfloat16(real_house, temperature, monkeypatch):
    check_every_way(real_house, temperature, 10, monkeypatch)


@pytest.mark.parametrize("model", ["llama 9 heads over 3, tied", "gemma3 6 layers"])
@pytest.mark.parametrize("library", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_small_models_in_both_libraries(model, library, dtype, tmp_path, monkeypatch):
    if library == "native":
        kernels: Kernels = NativeKernels(dtype=dtype, batch_invariant=True, threads=2)
    else:
        kernels = TorchKernels(dtype=dtype, batch_invariant=True, threads=2)
    make(model).save_pretrained(tmp_path)
    house = House(tmp_path, kernels)
    # The reference is plain torch and slow: fewer prompts, the same ways.
    check_every_way(house, 0.9, 6, monkeypatch, PROMPTS if library == "native" else 9)


class Leaky(NativeKernels):
    """Lets the number of rows reach the last bit of one element, as a shape-tuned library would."""

    def capture(self, build, x):
        program = super().capture(build, x)

        class LeakyProgram(Program):
            def run(self, x, batch):
                result = program.run(x, batch)
                if len(x) > 20:
                    result[-1, 0] = torch.nextafter(result[-1, 0], torch.tensor(torch.inf))
                return result

        return LeakyProgram()


def test_the_self_test_at_start_up_notices_one_bit(smollm2_dir):
    house = House(smollm2_dir, NativeKernels(dtype=torch.float32, batch_invariant=True, threads=2))
    house.attach(64)
    shape = {"groups": 1, "num_blocks": 64, "block_size": BLOCK, "max_num_seqs": 40}
    check_batch_invariance(house.decoder, **shape)
    leaky = House(smollm2_dir, Leaky(dtype=torch.float32, batch_invariant=True, threads=2))
    leaky.attach(64)
    with pytest.raises(NotBatchInvariant, match="changed the logits by up to"):
        check_batch_invariance(leaky.decoder, **shape)
