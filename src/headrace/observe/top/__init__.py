"""A running server seen live in the terminal: what `headrace top` shows.

In: what the server's /cluster and /metrics answer. Out: frames, as text or on a screen. It must not know more
of the server than these two answers, so that it can look at one anywhere.
"""
