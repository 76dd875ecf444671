"""How long a step takes on given hardware: a roofline over what its rows ask for.

In: a model's shape, a worker's rates, and the rows of a step. Out: seconds. Rates come from a data sheet and
stated efficiencies (`hardware.py`), or from a fit to measured steps (`fit.py`). It must not know engines,
clusters or requests, and takes no time of any clock.
"""

from headrace.sim.cost.hardware import DEVICES, Device, Efficiency, device, rates_of
from headrace.sim.cost.models import MODELS, ModelShape, model
from headrace.sim.cost.step import Rates, Row, StepCost

__all__ = [
    "DEVICES",
    "MODELS",
    "Device",
    "Efficiency",
    "ModelShape",
    "Rates",
    "Row",
    "StepCost",
    "device",
    "model",
    "rates_of",
]
