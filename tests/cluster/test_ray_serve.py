"""A package as a Ray Serve application, on a real cluster: the same addresses, and a replica that is killed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import shoal
from tests.cluster import nodes

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[1] / "runs" / "line.py"
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import httpx, ray
from ray import serve
from shoal.launch.ray_serve import application
from shoal.launch.service import Target

ray.init(log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": 8123})
package, job_file = map(Path, sys.argv[1:])
serve.run(application(Target(package, job_file=job_file), num_replicas=2), route_prefix="/")
url = "http://127.0.0.1:8123/v2"
row = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}

def asked():
    return httpx.post(f"{url}/models/line/infer", json={"inputs": [row]}, timeout=60)

told = {"ready": httpx.get(f"{url}/health/ready").json(), "first": asked().json()}
told["wrong"] = httpx.post(f"{url}/models/line/infer", json={"inputs": []}).status_code
actors = ray.util.state.list_actors(filters=[("class_name", "=", "ServeReplica:default:shoal-package")])
pids = [actor.pid for actor in actors if actor.state == "ALIVE"]
os.kill(pids[0], signal.SIGKILL)
deadline_s, answers = time.monotonic() + 60, []
while len(answers) < 20 and time.monotonic() < deadline_s:
    answer = asked()
    if answer.status_code == 200:
        answers.append(answer.json()["outputs"][0]["data"])
told |= {"replicas": len(pids), "after": answers}
serve.shutdown()
print(json.dumps(told))
"""


def test_a_package_is_an_application_of_ray_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if find_spec("ray") is None:
        pytest.skip("needs shoal[ray]")
    if reason := nodes.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))
    run = shoal.train(JOB, name="run", options=shoal.TrainOptions(quiet=True))
    expected = shoal.predict(run, {"input": [[1.0, 2.0, 3.0, 4.0]]})["output"].reshape(-1).tolist()
    from shoal.launch.exporting import export

    export(run, tmp_path / "package")
    with nodes.cluster({}) as cluster:
        cluster.add(num_cpus=4)
        ask = [sys.executable, "-c", SCRIPT, str(tmp_path / "package"), str(JOB)]
        answer = cluster.head.run(ask, env={"RAY_ADDRESS": cluster.address})
    assert answer.returncode == 0, answer.stderr[-3000:]
    told = json.loads(answer.stdout.splitlines()[-1])
    assert told["ready"] == {"ready": True} and told["wrong"] == 400 and told["replicas"] == 2
    assert told["first"]["outputs"][0]["data"] == pytest.approx(expected)
    assert told["after"] == [pytest.approx(expected)] * 20
