"""Predictions over HTTP and gRPC from a trained version: the Open Inference Protocol v2, and plain JSON."""

from shoal.serving.batching import Batching
from shoal.serving.client import predict
from shoal.serving.limits import Limits
from shoal.serving.mounting import asgi_app, flask_blueprint
from shoal.serving.predictor import ModelPredictor, Predictor, make_predictor
from shoal.serving.server import Server, serve

__all__ = [
    "Batching",
    "Limits",
    "ModelPredictor",
    "Predictor",
    "Server",
    "asgi_app",
    "flask_blueprint",
    "make_predictor",
    "predict",
    "serve",
]
