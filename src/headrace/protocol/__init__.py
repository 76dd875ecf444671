"""What processes say to each other: requests, outputs, errors, messages, and the channel that carries them.

Everything here is a frozen msgspec struct; nothing is ever pickled.
"""
