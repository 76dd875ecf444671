"""Text to tokens and back: tokenizer, chat templates, incremental detokenizer, stop strings.

In: strings and token ids. Out: the other. Works on one request's text at a time and never imports torch.
"""
