"""What can be wrong with text on its way to or from tokens.

All are `ValueError`s whose message can be shown to the client who sent the text.
"""


class TextError(ValueError):
    """Text, messages or a template that cannot be turned into tokens.

    `field` says which part of the client's request it is about, such as `messages[2].content`, where one is
    known.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TemplateError(TextError):
    """A chat template that cannot be compiled, refuses the conversation, or does more than it may."""


class UnsupportedTokenizerError(TextError):
    """A tokenizer whose way of turning tokens into text is not known here."""
