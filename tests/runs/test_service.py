"""`shoal serve` as its users have it: a command, its processes, who may ask and who may change it."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import shoal
from shoal.cli import main
from shoal.launch.services import ServiceFolder
from shoal.serving import predict
from shoal.versions import Snapshot, Store, Versions
from tests.runs import rated
from tests.runs.background import in_background

pytestmark = pytest.mark.cluster

SHOAL = Path(sys.executable).with_name("shoal")
PATIENCE_S = 90.0
KEY = "a-key-that-nobody-guesses"
ROW = {"input": [[1.0, 2.0, 3.0, 4.0]]}


@dataclass
class Running:
    """A service of its own process. ``admin`` asks its admin port, with its key."""

    process: subprocess.Popen[str]
    url: str
    folder: ServiceFolder

    @property
    def base(self) -> str:
        return self.url.partition("/v2/")[0]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.events_path.read_text().splitlines()]

    def admin(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        secret = self.folder.key_path.read_text().strip() if key is None else key
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return httpx.request(method, self.folder.read().admin_url + path, headers=headers, timeout=PATIENCE_S, **more)

    def until(self, is_so: Callable[[list[dict[str, Any]]], Any]) -> Any:
        deadline_s = time.monotonic() + PATIENCE_S
        while not (found := is_so(self.events)):
            assert time.monotonic() < deadline_s and self.process.poll() is None, self.events
            time.sleep(0.02)
        return found

    def until_event(self, kind: str, version: int | None = None) -> dict[str, Any]:
        """The first of a kind, once there is one."""
        return self.until(lambda events: next(
            (e for e in events if e["kind"] == kind and version in (None, e.get("version"))), None
        ))  # fmt: skip


@contextmanager
def service(run: str, *options: object) -> Iterator[Running]:
    words = [str(SHOAL), "serve", run, "--port", "0", *map(str, options)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert line.startswith("serving at "), line + process.stderr.read()
            yield Running(process, line.split()[-1], ServiceFolder(Path(os.environ["SHOAL_RUNS"], ".services", run)))
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has ended, of which three versions are kept."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(Path(__file__).parent / "line.py", folder / "line.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_RUNS", str(folder / "runs"))
        shoal.train(
            folder / "line.py", name="run", settings=["storing.every_steps=5"], options=shoal.TrainOptions(quiet=True)
        )
    return folder / "runs"


@pytest.fixture(autouse=True)
def _there(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_RUNS", str(runs))


def stored(runs: Path) -> Versions:
    return Versions(Store(str(runs / "run")), keep_last=20)


def store_next(runs: Path, weight: float) -> int:
    """One more version of the run, whose weights are all this."""
    last = stored(runs).read()
    model = {name: torch.full_like(tensor, weight) for name, tensor in last.model.items()}
    step = last.step + 1
    stored(runs).write(Snapshot(step, model, last.optimizer, {**last.meta, "fingerprint": f"{step:016x}"}))
    return step


def test_versions_come_are_refused_rolled_back_and_promoted(command, runs, tmp_path):
    with service("run", "--follow", "--replicas", 2, "--gate", "rmse<=live+1.5", "--shadow", 0, "--canary", "none",
                 "--access-log", tmp_path / "access") as running:  # fmt: skip
        first = stored(runs).newest()
        assert predict(running.url, ROW)["output"].shape == (1, 1)
        worse = store_next(runs, -5.0)
        refused = running.until_event("gate_refused", worse)
        assert refused["reasons"][0].startswith("rmse <= live +1.5: ")
        good = store_next(runs, 1.0)
        running.until_event("promoted", good)
        assert httpx.get(running.url).json()["versions"] == [str(good), str(first)]
        assert predict(running.url, ROW)["output"].tolist() == [[11.0]]
        told = command("versions", "--json").value
        assert (told["live"], told["previous"], told["refused"]) == (good, first, [worse])
        lines = command("status", "run").out
        assert f"service run at {running.base}" in lines and f"{good}  live      2 processes" in lines
        assert command("rollback", "--json").value["live"] == first
        again = command("rollback")
        assert again.code == 2 and "no version before the live one is loaded" in again.err
        assert command("promote", "run", "--version", worse, "--json").value["live"] == worse
        assert predict(running.url, ROW)["output"].tolist() == [[-55.0]]
        assert command("promote", "--version", 999).code == 2
        asked = [(e["verb"], e["outcome"] == "done") for e in running.events if e["kind"] == "asked"]
        assert asked == [("rollback", True), ("rollback", False), ("promote", True), ("promote", False)]
    lines = [json.loads(line) for line in (tmp_path / "access").read_text().splitlines()]
    assert [(line["status"], line["version"], line["samples"]) for line in lines] == [
        (200, first, 1), (200, good, 1), (200, worse, 1)
    ]  # fmt: skip
    assert command("versions").code == 2, "it has ended"


def test_a_killed_process_and_a_second_service_of_the_name(command, runs):
    with service("run", "--replicas", 2) as running:
        pids = command("versions", "run", "--json").value["loaded"][str(stored(runs).newest())]["pids"]
        os.kill(pids[0], signal.SIGKILL)
        for _ in range(20):
            assert httpx.post(f"{running.url}/infer", content=body()).status_code == 200
        running.until_event("replica_replaced")
        other = command("serve", "run", "--port", 0)
        assert other.code == 2 and "a service run runs already" in other.err
        metrics = httpx.get(f"{running.base}/metrics").text
        assert 'shoal_requests_total{face="http",status="200"} 20.0' in metrics
        assert f"shoal_model_version {stored(runs).newest()}.0" in metrics
        assert 'shoal_decisions_total{kind="replica_lost"} 1.0' in metrics
        left = [pid for pid in pids[1:] if is_there(pid)]
    assert left and not [pid for pid in left if is_there(pid)]


def body() -> bytes:
    row = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    return json.dumps({"inputs": [row]}).encode()


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_requests_at_hand_are_answered_before_it_ends(runs):
    with service("run") as running, httpx.Client(timeout=PATIENCE_S) as client:
        assert client.get(f"{running.base}/v2/health/ready").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE_S) == -signal.SIGTERM
    assert running.events[-1]["kind"] == "service_ended" and not running.folder.is_alive()


@pytest.fixture(name="key_file")
def _key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(name="pem")
def _pem(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for the loopback that signs itself, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shoal")])
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1)).add_extension(loopback, critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return paths


def test_with_a_key_and_a_certificate_only_who_has_them_is_answered(runs, key_file, pem):
    options = ("--key-file", key_file, "--tls-cert", pem[0], "--tls-key", pem[1])
    with service("run", *options) as running:
        assert running.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(pem[0]))
        with httpx.Client(verify=context) as client:
            for headers, status in (
                ({}, 401), ({"X-API-Key": KEY[:-1] + "x"}, 401), ({"Authorization": f"Bearer {KEY}"}, 200),
                ({"X-API-Key": KEY}, 200),
            ):  # fmt: skip
                assert client.post(f"{running.url}/infer", content=body(), headers=headers).status_code == status
                assert client.get(running.url, headers=headers).status_code == status
                assert client.get(f"{running.base}/metrics", headers=headers).status_code == status
            assert client.get(f"{running.base}/v2/health/ready").status_code == 200, "health is told to everybody"
            answer = client.post(f"{running.url}/infer", content=body())
            assert answer.headers["www-authenticate"] == "Bearer" and "a key is needed" in answer.json()["error"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url)
        command_line = Path(f"/proc/{running.process.pid}/cmdline")
        assert not command_line.exists() or KEY not in command_line.read_text()


def test_changes_need_their_own_key_at_their_own_port(runs, key_file):
    with service("run", "--key-file", key_file) as running:
        for key in ("", KEY, "x" * 32):
            for method, path in (("GET", "/status"), ("POST", "/promote"), ("POST", "/rollback")):
                answer = running.admin(method, path, key=key)
                assert answer.status_code == 401, "a key for predictions is none for changes"
        assert running.admin("GET", "/status").json()["live"] == stored(runs).newest()
        assert httpx.post(f"{running.base}/rollback", headers={"X-API-Key": KEY}).status_code == 404
        assert running.admin("POST", "/promote", content=b'{"version": "x"}').status_code == 400
        assert running.admin("POST", "/promote", content=b"[" * 5000).status_code == 413
        denied = running.admin("POST", "/rollback")
        assert denied.status_code == 409 and "no version before the live one" in denied.json()["error"]
        assert running.folder.key_path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--version", 3], "version 3 is not stored; those that are: "),
        (["--gate", "accuracy is good"], "a gate looks like accuracy>=0.9"),
        (["--canary", "1.5"], "canary_shares lie between 0 and 1"),
        (["--canary", "a"], "--canary is shares such as 0.1,0.5, or none"),
        (["--key-file", "nowhere"], "the key file nowhere cannot be read"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "nowhere", "--tls-key", "nowhere"], "nowhere is no file: TLS needs a certificate"),
        (["--access-log", "nowhere/log"], "the access log nowhere/log cannot be written"),
        (["--max-batch", 0], "max_samples must be at least 1"),
        (["--timeout", 0], "timeout_s must be above 0"),
        (["--job", "line.py"], "a run knows its job"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(command, runs, options, reason):
    answer = command("serve", "run", "--port", 0, *options)
    assert answer.code == 2 and reason in answer.err


def test_a_certificate_that_is_none_is_refused(command, runs, key_file, pem):
    answer = command("serve", "run", "--port", 0, "--tls-cert", pem[0], "--tls-key", key_file)
    assert answer.code == 2 and "cannot be used for TLS" in answer.err


def test_a_model_that_does_not_load_is_told(command, runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "runs" / "damaged")
    record = json.loads((tmp_path / "runs" / "damaged" / "run.json").read_text())
    record["store"] = str(tmp_path / "runs" / "damaged")
    (tmp_path / "runs" / "damaged" / "run.json").write_text(json.dumps(record))
    newest = max((tmp_path / "runs" / "damaged" / "versions").iterdir())
    next(newest.glob("model*")).write_bytes(b"no tensors")
    answer = command("serve", tmp_path / "runs" / "damaged", "--port", 0)
    assert answer.code == 1 and "cannot be served" in answer.err and "damaged" in answer.err


def test_a_live_run_with_tables_is_followed_by_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "live"))
    job_file = Path(__file__).parent / "rated.py"
    settings = ["--set", "epochs=4000", "--set", "storing.every_steps=40", "--set", "storing.keep_last=50"]
    call = partial(main, ["train", str(job_file), "--name", "run", "--quiet", *settings])
    with in_background(call, "run") as run:
        run.until("stored", 40)
        with service("run", "--follow", "--shadow", 0, "--canary", "none") as running:
            running.until(lambda events: sum(e["kind"] == "loaded" and e["by_delta"] for e in events) >= 2)
            running.until_event("promoted", [e["version"] for e in running.events if e["kind"] == "loaded"][-1])
            answers = [answered(running.url) for _ in range(20)]
            loaded = [event for event in running.events if event["kind"] == "loaded"]
        os.kill(run.pid, signal.SIGTERM)
    assert not [event for event in running.events if event["kind"].endswith("_refused")]
    assert not loaded[0]["by_delta"], "there was nothing to add to"
    version, rating = answers[-1]
    found = shoal.predict(tmp_path / "live" / "run", asked(), version=version)["rating"]
    np.testing.assert_allclose(rating, found.numpy(), rtol=1e-5)


def asked() -> dict[str, Any]:
    return {"user": rated.users[:4].tolist(), "tags": rated.tags[:4].tolist()}


def answered(url: str) -> tuple[int, list[float]]:
    inputs = [
        {"name": "user", "datatype": "INT64", "shape": [4], "data": asked()["user"]},
        {"name": "tags", "datatype": "INT64", "shape": [4, 3], "data": asked()["tags"]},
    ]
    answer = httpx.post(f"{url}/infer", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return int(told["model_version"]), told["outputs"][0]["data"]
