"""Which worker a request goes to, and why.

In: the request, the workers that could take it, and what is known of their caches, queues and speed. Out: a
`Decision`, which names the chosen one and every term of every candidate's score. It must not send anything.
"""

from headrace.cluster.routing.candidates import Candidates, Wish
from headrace.cluster.routing.decision import Decision
from headrace.cluster.routing.policy import Policy, Terms
from headrace.cluster.routing.router import Router

__all__ = ["Candidates", "Decision", "Policy", "Router", "Terms", "Wish"]
