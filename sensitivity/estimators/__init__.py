"""The numerical part of the metrics: estimators that are pure functions of what they estimate."""

from sensitivity.estimators.estimate import Estimate
from sensitivity.estimators.ghost import squared_norms, summed_squares, weighted_squares
from sensitivity.estimators.hutchinson import hutchinson
from sensitivity.estimators.hutchpp import hutchpp

__all__ = [
    "Estimate",
    "hutchinson",
    "hutchpp",
    "squared_norms",
    "summed_squares",
    "weighted_squares",
]
