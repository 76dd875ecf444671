"""One sample's tokens to text that may be sent, and how the sample ended.

In: outputs of one sample, in order. Out: pieces of text. Stop strings are found here, so this is also where a
sample may end before the engine knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from headrace.protocol.requests import FinishReason, SequenceOutput, TokenLogprobs
from headrace.text import IncrementalDetokenizer, StopChecker, Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. Stop strings count only after `min_tokens` tokens."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    token_ids: bool = False
    """Whether pieces carry the ids of their tokens."""


class Piece(msgspec.Struct):
    """What was added to a sample: text, and its tokens one by one where they were asked for."""

    text: str
    logprobs: list[TokenLogprobs] = []
    token_texts: list[str] = []
    """What each token of `logprobs` added to the text, before stop strings were looked for."""
    token_ids: list[int] = []
    """Of the tokens that were taken in, where the options ask for them."""


class Sample:
    """Turns outputs into pieces until `finish_reason` is set."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._options = options
        self._detokenizer = IncrementalDetokenizer(tokenizer, options.skip_special_tokens, continues=True)
        self._stops = StopChecker(options.stop, options.include_stop) if options.stop else None
        self.tokens = 0
        """Tokens generated, the one that stopped it included."""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        """The stop string, or the stop token asked for, that ended the sample."""
        self.stopped_here = False
        """A stop string was found: the engine does not know yet that this sample has ended."""

    def push(self, output: SequenceOutput) -> Piece:
        """Take in the next output. One that ends in an error is the caller's business."""
        piece = Piece("")
        finish = output.finish
        stop_token = finish.stop_token if finish is not None else None
        hidden = len(output.tokens) - 1 if stop_token is not None and not self._options.include_stop else None
        for i, token in enumerate(output.tokens):
            self.tokens += 1
            if self._options.token_ids:
                piece.token_ids.append(token)
            text = "" if i == hidden else self._detokenizer.push(token)
            if output.logprobs is not None:
                piece.logprobs.append(output.logprobs[i])
                piece.token_texts.append(text)
            piece.text += text if self._stops is None else self._checked(text)
            if self.finish_reason is not None:
                self.stopped_here = finish is None or i < len(output.tokens) - 1
                return piece
        if finish is not None:
            self._end(piece, finish.reason, stop_token)
        return piece

    def _checked(self, text: str) -> str:
        """What of `text` may be sent; ends the sample where a stop string is complete."""
        if self._stops is None or self.tokens <= self._options.min_tokens:
            return text
        text = self._stops.push(text)
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            self.stop_reason = self._stops.matched
        return text

    def _end(self, piece: Piece, reason: FinishReason, stop_token: int | None) -> None:
        text = self._detokenizer.flush()
        if piece.token_texts:
            piece.token_texts[-1] += text
        piece.text += self._checked(text)
        if self.finish_reason is None:
            if self._stops is not None:
                piece.text += self._stops.flush()
            self.finish_reason = "length" if reason is FinishReason.LENGTH else "stop"
            self.stop_reason = stop_token
