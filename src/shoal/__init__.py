"""Shoal: distributed machine learning from data to live predictions, on ordinary machines and networks.

Importing it starts nothing, and loads torch and the rest only when a name that needs them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.codecs import Cast as Cast
    from shoal.codecs import Chain as Chain
    from shoal.codecs import Int4 as Int4
    from shoal.codecs import Int8 as Int8
    from shoal.codecs import OneBit as OneBit
    from shoal.codecs import PowerSGD as PowerSGD
    from shoal.codecs import RandomK as RandomK
    from shoal.codecs import TopK as TopK
    from shoal.comm.ddp import ddp_hook as ddp_hook
    from shoal.errors import Bug as Bug
    from shoal.errors import ConfigError as ConfigError
    from shoal.errors import Diverged as Diverged
    from shoal.errors import Fault as Fault
    from shoal.errors import ShoalError as ShoalError
    from shoal.errors import StoreFault as StoreFault
    from shoal.errors import VersionFault as VersionFault
    from shoal.job import Balance as Balance
    from shoal.job import Job as Job
    from shoal.job import Patience as Patience
    from shoal.job import Predicts as Predicts
    from shoal.job import Storing as Storing
    from shoal.job import Task as Task
    from shoal.job import TensorSpec as TensorSpec
    from shoal.launch.run import Run as Run
    from shoal.launch.run import Stopped as Stopped
    from shoal.launch.run import TrainOptions as TrainOptions
    from shoal.launch.run import resume as resume
    from shoal.launch.run import train as train
    from shoal.launch.using import Account as Account
    from shoal.launch.using import account as account
    from shoal.launch.using import evaluate as evaluate
    from shoal.launch.using import load_model as load_model
    from shoal.launch.using import predict as predict
    from shoal.launch.using import predictor as predictor
    from shoal.optim import Nesterov as Nesterov
    from shoal.shards.embedding import Embedding as Embedding
    from shoal.shards.embedding import EmbeddingBag as EmbeddingBag
    from shoal.sources import Arrays as Arrays
    from shoal.sources import Parquet as Parquet
    from shoal.strategies import AllReduce as AllReduce
    from shoal.strategies import DiLoCo as DiLoCo
    from shoal.strategies import Hybrid as Hybrid
    from shoal.strategies import LocalSGD as LocalSGD
    from shoal.strategies import ParameterServer as ParameterServer
    from shoal.tables import FTRL as FTRL
    from shoal.tables import SGD as SGD
    from shoal.tables import Adagrad as Adagrad
    from shoal.tables import Adam as Adam
    from shoal.tables.consistency import Async as Async
    from shoal.tables.consistency import Bounded as Bounded
    from shoal.tables.consistency import Sync as Sync

_HOMES = {
    "shoal.errors": (
        "Bug", "ConfigError", "Diverged", "Fault", "ShoalError", "StoreFault", "VersionFault",
    ),
    "shoal.job": ("Balance", "Job", "Patience", "Predicts", "Storing", "Task", "TensorSpec"),
    "shoal.launch.run": ("Run", "Stopped", "TrainOptions", "resume", "train"),
    "shoal.launch.using": ("Account", "account", "evaluate", "load_model", "predict", "predictor"),
    "shoal.sources": ("Arrays", "Parquet"),
    "shoal.codecs": ("Cast", "Chain", "Int4", "Int8", "OneBit", "PowerSGD", "RandomK", "TopK"),
    "shoal.comm.ddp": ("ddp_hook",),
    "shoal.optim": ("Nesterov",),
    "shoal.shards.embedding": ("Embedding", "EmbeddingBag"),
    "shoal.strategies": ("AllReduce", "DiLoCo", "Hybrid", "LocalSGD", "ParameterServer"),
    "shoal.tables": ("FTRL", "SGD", "Adagrad", "Adam"),
    "shoal.tables.consistency": ("Async", "Bounded", "Sync"),
}  # fmt: skip

__all__ = [name for names in _HOMES.values() for name in names]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
