"""Text to tokens and back: tokenizer, chat templates, incremental detokenizer, stop strings.

In: strings and token ids. Out: the other. Works on one request's text at a time and never imports torch.
"""

from .chat import ChatTemplate, special_tokens_of
from .detokenizer import IncrementalDetokenizer
from .errors import TemplateError, TextError, UnsupportedTokenizerError
from .stopping import StopChecker
from .tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopChecker",
    "TemplateError",
    "TextError",
    "Tokenizer",
    "UnsupportedTokenizerError",
    "special_tokens_of",
]
