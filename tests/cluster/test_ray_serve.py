"""A package as a Ray Serve application, on a real cluster of one node: the same addresses, and a replica that is
killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import shoal
from shoal.launch.exporting import export

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[1] / "runs" / "line.py"
SCRIPT = """
import json, os, signal, socket, sys, time
from pathlib import Path
import httpx, ray
from ray import serve
from shoal.launch.ray_serve import application
from shoal.launch.service import Target

package, job_file, folder = map(Path, sys.argv[1:])
kept = socket.socket()  # for Ray Serve: it does not listen, and to no one else is its port free
kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
kept.bind(("127.0.0.1", 0))
port = kept.getsockname()[1]
ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False, _temp_dir=str(folder))
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application(Target(package, job_file=job_file), num_replicas=2), route_prefix="/")
url = f"http://127.0.0.1:{port}/v2"
row = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}

def asked():
    return httpx.post(f"{url}/models/line/infer", json={"inputs": [row]}, timeout=60)

def title(process):
    try:
        return (process / "cmdline").read_bytes().split(b"\\0")[0]
    except (FileNotFoundError, ProcessLookupError):  # whosever it was, it has ended
        return b""

def replicas():
    name = f"shoal-{package.name}".encode()
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if name in title(process)]

told = {"ready": httpx.get(f"{url}/health/ready").json(), "first": asked().json(), "replicas": len(replicas())}
told["wrong"] = httpx.post(f"{url}/models/line/infer", json={"inputs": []}).status_code
os.kill(replicas()[0], signal.SIGKILL)
deadline_s, answers = time.monotonic() + 60, []
while len(answers) < 20 and time.monotonic() < deadline_s:
    answer = asked()
    if answer.status_code == 200:
        answers.append(answer.json()["outputs"][0]["data"])
told["after"] = answers
serve.shutdown()
ray.shutdown()
print(json.dumps(told))
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="needs shoal[ray]")
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_a_package_is_an_application_of_ray_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))
    run = shoal.train(JOB, name="run", options=shoal.TrainOptions(quiet=True))
    expected = shoal.predict(run, {"input": [[1.0, 2.0, 3.0, 4.0]]})["output"].reshape(-1).tolist()
    folder = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))  # short, for Ray's sockets
    package = export(run, tmp_path / folder.name)
    command = [sys.executable, "-c", SCRIPT, str(package), str(JOB), str(folder)]
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        answer = subprocess.run(command, env={**inherited, **ours}, capture_output=True, text=True, timeout=300)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    told = json.loads(answer.stdout.splitlines()[-1])
    assert told["ready"] == {"ready": True} and told["wrong"] == 400 and told["replicas"] == 2
    assert told["first"]["outputs"][0]["data"] == pytest.approx(expected)
    assert told["after"] == [pytest.approx(expected)] * 20
