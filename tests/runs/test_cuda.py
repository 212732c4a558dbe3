"""Jobs whose model is on a GPU: as on the processor, to rounding. Real runs, whose workers are processes apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shoal
from shoal.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HERE = Path(__file__).parent
QUIET = shoal.TrainOptions(quiet=True)
STRATEGIES = {
    "all_reduce": "shoal.AllReduce()",
    "int8": "shoal.AllReduce(codec=shoal.Int8())",
    "local": "shoal.LocalSGD(sync_every_steps=3)",
    "diloco": "shoal.DiLoCo(sync_every_steps=4, codec=shoal.Int4(), overlap_steps=2)",
}


def trained(job: Path, device: str, *settings: str) -> shoal.Run:
    return shoal.train(job, settings=[f"device={device}", *settings], options=QUIET)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_a_gpu_is_that_on_a_cpu_to_rounding(job_file, strategy):
    job = job_file({"num_threads=1,": f"num_threads=1, strategy={STRATEGIES[strategy]},"})
    there, here = trained(job, "cuda"), trained(job, "cpu")
    assert there.outcome == "done" and there.figures["rmse"] == pytest.approx(here.figures["rmse"], rel=1e-3)
    for mine, other in zip(shoal.load_model(there).parameters(), shoal.load_model(here).parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_gone_on_with_has_the_bits_of_one_that_never_stopped(job_file):
    job = job_file({"epochs=2": "epochs=4", "torch.optim.SGD(parameters, lr=0.1)": "torch.optim.Adam(parameters)"})
    whole = trained(job, "cuda")
    part = trained(job, "cuda", "epochs=2")
    resumed = shoal.resume(part.path, settings=["epochs=4"], options=QUIET)
    for mine, other in zip(shoal.load_model(resumed).parameters(), shoal.load_model(whole).parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.cluster
def test_tables_serve_a_model_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TABLED_SAMPLES", "640")
    run = trained(HERE / "tabled.py", "cuda")
    assert run.outcome == "done"
    counts = shoal.load_model(run).counts(torch.arange(640))
    assert torch.equal(counts * -32, torch.ones(640, 1))


def test_more_workers_than_gpus_are_refused(job_file):
    number = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"{number + 1} workers .* need a GPU each, and there are {number} here"):
        shoal.train(job_file(), workers=number + 1, settings=["device=cuda"], options=QUIET)


HOOKED = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import shoal
place = "file://" + os.environ["PLACE"]
dist.init_process_group("cpu:gloo,cuda:nccl", init_method=place, rank=0, world_size=1)
for codec in (None, shoal.Int8(), shoal.OneBit(), shoal.PowerSGD(2), shoal.TopK(500), shoal.RandomK(500)):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
    hooked = DistributedDataParallel(model)
    hooked.register_comm_hook(*shoal.ddp_hook(hooked, codec))
    optimizer = torch.optim.SGD(hooked.parameters(), lr=0.05)
    x = torch.randn(64, 20, device="cuda")
    for step in range(60):
        optimizer.zero_grad()
        loss = (hooked(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    print(type(codec).__name__, float(loss))
    assert float(loss) < 8, codec
os._exit(0)
"""


def test_the_hook_exchanges_gradients_on_a_gpu(tmp_path):
    environment = os.environ | {"PLACE": str(tmp_path / "store"), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", HOOKED], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 6
