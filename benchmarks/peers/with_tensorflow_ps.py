"""TensorFlow's ParameterServerStrategy as a peer of ``sparse``: one parameter server, one worker and a chief, over
loopback, in TensorFlow's own environment.

python -m benchmarks.peers.with_tensorflow_ps ROLE FOLDER [CLUSTER]

A turn gathers the rows of distinct ids of a variable on the server, and applies as many gradients there with Adagrad by
the op that its optimizers use. ``turn`` and ``gather``: the worker does many in one function, so that what the chief
needs to schedule it counts little; ``scheduled``: each turn is a closure that the chief schedules, as its guide has it.
ROLE ``all`` starts the rest and prints, as JSON, milliseconds of each by the size of a batch.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DIM, NUM_IDS = 16, 1_000_000
TURNS = {500: 400, 5_000: 100, 100_000: 10}
REPEATS = 3


def ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def start_all(folder: str) -> None:
    chief, worker, server = ports(3)
    cluster = {"chief": [chief], "worker": [worker], "ps": [server]}
    told = json.dumps({role: [f"127.0.0.1:{port}" for port in own] for role, own in cluster.items()})
    words = [sys.executable, "-m", "benchmarks.peers.with_tensorflow_ps"]
    servers = [
        subprocess.Popen([*words, role, folder, told], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for role in ("worker", "ps")
    ]
    try:
        subprocess.run([*words, "chief", folder, told], check=True, timeout=300)
    finally:
        for each in servers:
            each.kill()
            each.wait()
    print((Path(folder) / "times.json").read_text())


def cluster_of(told: str, role: str) -> object:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": json.loads(told), "task": {"type": role, "index": 0}})
    os.environ["GRPC_FAIL_FAST"] = "use_caller"
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2)
    return tf.distribute.cluster_resolver.TFConfigClusterResolver()


def serve(told: str, role: str) -> None:
    resolver = cluster_of(told, role)
    import tensorflow as tf

    server = tf.distribute.Server(resolver.cluster_spec(), job_name=role, task_index=0, protocol="grpc", start=True)
    server.join()


def lead(folder: str, told: str) -> None:
    resolver = cluster_of(told, "chief")
    import tensorflow as tf

    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        table = tf.Variable(tf.zeros([NUM_IDS, DIM]), name="table")
        squares = tf.Variable(tf.fill([NUM_IDS, DIM], 0.1), name="squares", trainable=False)

    def gathered(ids: object) -> object:
        with tf.device(table.device):  # where it is: the ids go there, and the rows come back
            return tf.raw_ops.ResourceGather(resource=table.handle, indices=ids, dtype=tf.float32)

    @tf.function
    def turns(ids: object, number: object, push: object) -> object:
        total = tf.constant(0.0)
        for _ in tf.range(number):
            rows = gathered(ids)
            total += tf.reduce_sum(rows[:, 0])
            if push:
                gradients = rows * 0.001 + 0.01
                with tf.device(table.device):
                    tf.raw_ops.ResourceSparseApplyAdagradV2(
                        var=table.handle, accum=squares.handle, lr=0.05, epsilon=1e-7, grad=gradients, indices=ids
                    )
        return total

    random = np.random.default_rng(0)
    found = {}
    for size, number in TURNS.items():
        ids = tf.constant(random.choice(NUM_IDS, size, replace=False), tf.int64)
        for name, push, closures in (("turn", True, 1), ("gather", False, 1), ("scheduled", True, number)):
            args = (ids, tf.constant(number // closures), tf.constant(push))
            coordinator.schedule(turns, args=args)
            coordinator.join()
            times = []
            for _ in range(REPEATS):
                begun_s = time.perf_counter()
                for _ in range(closures):
                    coordinator.schedule(turns, args=args)
                coordinator.join()
                times.append((time.perf_counter() - begun_s) / number)
            found[f"{name}_{size}_ms"] = 1e3 * sorted(times)[len(times) // 2]
    (Path(folder) / "times.json").write_text(json.dumps(found))
    os._exit(0)  # its threads would wait for servers that are about to be ended


def main() -> None:
    role, folder, *told = sys.argv[1:]
    if role == "all":
        start_all(folder)
    elif role == "chief":
        lead(folder, told[0])
    else:
        serve(told[0], role)


if __name__ == "__main__":
    main()
