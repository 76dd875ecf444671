"""Log-probabilities in the forms that clients know: chat's, text completions', and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.protocol.requests import TokenLogprobs
from headrace.text import Tokenizer

LEAST_LOGPROB = -9999.0
"""What stands for a token that cannot occur: JSON has no infinity."""


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


def completion_spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token as text completions name it: one that is only part of a character by its bytes, as OpenAI's did
    (`bytes:\\xf0\\x9f`), since all of those would have the same replacement character for a name."""
    spelled = tokenizer.token_bytes(token)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice or chunk."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token)
        return {
            "token": spelled.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(spelled),
        }

    content = [
        {
            **entry(chosen.token, chosen.logprob),
            "top_logprobs": [entry(token, logprob) for token, logprob in chosen.top],
        }
        for chosen in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[TokenLogprobs | None],
    tokens: Sequence[int],
    texts: Sequence[str],
    offset: int,
) -> dict[str, Any]:
    """The `logprobs` object of a text choice or chunk.

    `texts` is what each of `tokens` adds to the choice's text, `offset` where in it the first one begins. An
    entry of None is a prompt's first token, which nothing predicts. The alternatives include the chosen
    token.
    """

    def alternatives(entry: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in entry.top:  # the most likely first: it keeps a name that two have
            found.setdefault(completion_spelling(tokenizer, token), _finite(logprob))
        found[completion_spelling(tokenizer, entry.token)] = _finite(entry.logprob)
        return found

    def name(token: int, text: str) -> str:
        spelled = completion_spelling(tokenizer, token)
        return spelled if spelled.startswith("bytes:") else text

    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "text_offset": offsets,
        "tokens": list(map(name, tokens, texts)),
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else alternatives(entry) for entry in entries],
    }


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> list[Any]:
    """As vLLM has them: for each prompt token, ids to what is known of them; None for the first."""

    def position(entry: TokenLogprobs) -> dict[str, Any]:
        found = {
            token: {"logprob": _finite(logprob), "rank": rank, "decoded_token": _spelling(tokenizer, token)}
            for rank, (token, logprob) in enumerate(entry.top, 1)
        }
        found[entry.token] = {
            "logprob": _finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": _spelling(tokenizer, entry.token),
        }
        return {str(token): value for token, value in found.items()}

    return [None, *map(position, entries)]
