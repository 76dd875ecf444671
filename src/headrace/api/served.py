"""What every route works with: the models by name with their texts, the gateway, and what is measured.

Put together once at start-up; nothing here changes while the server runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

from headrace.cluster import Gateway
from headrace.cluster.options import ServiceLevels
from headrace.config import ServingOptions
from headrace.observe.service_levels import Attainment
from headrace.store import ModelFiles
from headrace.text import ChatTemplate, Tokenizer, special_tokens_of

ENCODE_INLINE_CHARACTERS = 4096
"""Texts up to this length are encoded at once (about 2 ms); longer ones beside the event loop, where the
tokenizer releases the interpreter's lock."""

TEXT_THREADS = 2
"""How many long texts are worked on at once. More would take the engine's cores."""

_T = TypeVar("_T")

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    """A model's name and its text."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the model's authors recommend where a client says nothing, from generation_config.json."""
    created: int = field(default_factory=lambda: int(time.time()))
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text"), repr=False
    )

    @classmethod
    def from_files(cls, files: ModelFiles, name: str | None = None) -> ServedModel:
        """Read tokenizer and chat template. Raises TextError for what cannot be read."""
        template = files.chat_template
        recommended = files.generation_config
        return cls(
            name=name or files.name,
            tokenizer=Tokenizer.from_file(
                files.tokenizer, bos_token_id=files.bos_token_id, eos_token_ids=files.eos_token_ids
            ),
            chat_template=ChatTemplate(template, special_tokens_of(files.tokenizer_config))
            if template is not None
            else None,
            sampling_defaults={
                key: recommended[key] for key in _SAMPLING_DEFAULTS if recommended.get(key) is not None
            },
        )

    @cached_property
    def vocabulary(self) -> bytes:
        """Models of equal ones give a token id the same meaning."""
        return self.tokenizer.fingerprint()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises TextError for what is not Unicode."""
        if len(text) <= ENCODE_INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await self.beside(lambda: self.tokenizer.encode(text, add_special_tokens))

    async def beside(self, work: Callable[[], _T]) -> _T:
        """Do long work on text while the event loop goes on, a few at a time; the others wait their turn."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class Measured(Protocol):
    """What is measured of the server, for those who look."""

    def text(self) -> bytes: ...
    def attainment(self) -> list[Attainment]: ...


@dataclass(frozen=True)
class Server:
    """The parts that routes share."""

    gateway: Gateway
    model: ServedModel
    metrics: Measured
    seeds: random.Random
    """Where a client gives no seed, it comes from here."""
    options: ServingOptions = field(default_factory=ServingOptions)
    slo: ServiceLevels = field(default_factory=ServiceLevels)
    """What requests may expect; for those who look."""
    others: tuple[ServedModel, ...] = ()
    """Models that are served beside the first."""
    names: tuple[str, ...] = ()
    """What clients may ask for, the first of which is meant where they name none: models, and names of
    several versions. Without any, the models' own."""

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(self.models))

    @cached_property
    def models(self) -> Mapping[str, ServedModel]:
        """All of them, by name."""
        return {model.name: model for model in (self.model, *self.others)}
