"""What every route works with: the model by name with its text, the gateway, and what is measured.

Put together once at start-up; nothing here changes while the server runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.cluster import Gateway
from headrace.config import ServingOptions
from headrace.observe import Metrics
from headrace.store import ModelFiles
from headrace.text import ChatTemplate, Tokenizer, special_tokens_of

ENCODE_INLINE_CHARACTERS = 16_384
"""Texts up to this length are encoded at once (about 3 ms); longer ones beside the event loop."""

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

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises TextError for what is not Unicode."""
        if len(text) <= ENCODE_INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)


@dataclass(frozen=True)
class Server:
    """The parts that routes share."""

    gateway: Gateway
    model: ServedModel
    metrics: Metrics
    seeds: random.Random
    """Where a client gives no seed, it comes from here."""
    options: ServingOptions = field(default_factory=ServingOptions)
