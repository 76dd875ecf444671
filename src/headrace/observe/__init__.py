"""What can be seen of a running system from outside: metrics, and a live view of them in `top`.

In: numbers from the gateway. Out: text for Prometheus. It must not know requests' contents or who made them.
"""

from headrace.observe.by_model import MetricsByModel
from headrace.observe.metrics import Metrics

__all__ = ["Metrics", "MetricsByModel"]
