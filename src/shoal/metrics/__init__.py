"""Metrics that merge exactly: the same figures over any partition of the samples, in any order."""

from shoal.metrics.accuracy import Accuracy, TopK
from shoal.metrics.confusion import F1, Confusion
from shoal.metrics.curves import AUC, AveragePrecision
from shoal.metrics.means import MAE, RMSE, LogLoss, Mean
from shoal.metrics.metric import Metric, Value
from shoal.metrics.table import from_state

__all__ = [
    "AUC", "F1", "MAE", "RMSE", "Accuracy", "AveragePrecision", "Confusion", "LogLoss", "Mean", "Metric", "TopK",
    "Value", "from_state",
]  # fmt: skip
