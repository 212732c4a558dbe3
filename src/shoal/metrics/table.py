"""From a stored state back to the metric it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import ConfigError
from shoal.metrics.accuracy import Accuracy, TopK
from shoal.metrics.confusion import F1, Confusion
from shoal.metrics.curves import AUC, AveragePrecision
from shoal.metrics.means import MAE, RMSE, LogLoss, Mean
from shoal.metrics.metric import Metric, parts_from_state

METRICS: tuple[type[Any], ...] = (Accuracy, TopK, LogLoss, AUC, AveragePrecision, Confusion, F1, RMSE, MAE, Mean)


def from_state(state: Mapping[str, Any]) -> Metric:
    """The metric whose ``to_state`` this is. ``ConfigError`` if it is none of this package's, or is damaged."""
    name = state.get("metric")
    for kind in METRICS:
        if kind.__name__ == name:
            restored: Metric = parts_from_state(kind, state)
            return restored
    known = ", ".join(kind.__name__ for kind in METRICS)
    raise ConfigError(f"a metric's state names one of {known}, not {name!r}")
