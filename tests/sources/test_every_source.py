"""Laws of every source, whatever it is made of."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal.sources
from shoal.lanes import Order, Part
from shoal.sources import Arrays, Parquet, Reader, Source
from tests.sources.rows import LABELS, NUM_ROWS, POINTS, columns, decode, same, twin, write

SECRET = "a secret"
NUMBERS = ["label", "point"]


def saved(folder: Path) -> tuple[Path, Path]:
    np.save(folder / "points.npy", POINTS)
    np.save(folder / "labels.npy", LABELS)
    return folder / "points.npy", folder / "labels.npy"


def in_memory(folder: Path) -> Source:
    system = fsspec.filesystem("memory")
    for file in write(folder / "local").iterdir():
        system.pipe_file(f"/{folder.name}/{file.name}", file.read_bytes())
    return Parquet(f"memory://{folder.name}/*.parquet", columns=NUMBERS)


def on_s3(folder: Path) -> Source:
    pytest.importorskip("s3fs", reason="needs shoal[s3]")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "a key", "secret": SECRET, "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    SERVERS[str(folder)] = server
    system = fsspec.filesystem("s3", **options)
    system.mkdir("bucket")
    system.put(str(write(folder / "local")), "bucket/data", recursive=True)
    return Parquet("s3://bucket/data", columns=NUMBERS, storage_options=options, cached_bytes=0)


SERVERS: dict[str, Any] = {}
SOURCES: dict[str, Callable[[Path], Source]] = {
    "arrays": lambda folder: Arrays(POINTS, LABELS, block_rows=7),
    "arrays by name": lambda folder: Arrays(point=POINTS, label=LABELS),
    "one block an array row": lambda folder: Arrays(POINTS, LABELS, block_rows=1),
    "tensors": lambda folder: Arrays(torch.from_numpy(POINTS), torch.from_numpy(LABELS), block_rows=10),
    "memory-mapped": lambda folder: Arrays(*(np.load(path, mmap_mode="r") for path in saved(folder)), block_rows=10),
    "paths of arrays": lambda folder: Arrays(*saved(folder), block_rows=10),
    "columns in Fortran's order": lambda folder: Arrays(np.asfortranarray(POINTS), LABELS, block_rows=10),
    "every other row": lambda folder: Arrays(np.repeat(POINTS, 2, axis=0)[::2], LABELS, block_rows=10),
    "a folder": lambda folder: Parquet(write(folder), columns=NUMBERS),
    "a glob, nothing kept": lambda folder: Parquet(f"{write(folder)}/*.parquet", NUMBERS, cached_bytes=0),
    "a list": lambda folder: Parquet([write(folder) / f"{i}.parquet" for i in range(3)], NUMBERS),
    "one file": lambda folder: Parquet(write(folder, cuts=(0, NUM_ROWS)) / "0.parquet", NUMBERS),
    "one row a group": lambda folder: Parquet(write(folder, rows_a_group=1), NUMBERS, cached_bytes=100),
    "decoded": lambda folder: Parquet(write(folder), decode=decode, cached_bytes=300),
    "an empty file among others": lambda folder: Parquet(write(folder, cuts=(0, 20, 20, NUM_ROWS)), NUMBERS),
    "a URL": in_memory,
    "S3": on_s3,
}


def test_every_public_source_is_here(tmp_path: Path) -> None:
    public = [getattr(shoal.sources, name) for name in shoal.sources.__all__]
    kinds = {kind for kind in public if hasattr(kind, "block_sizes") and not getattr(kind, "_is_protocol", False)}
    assert kinds == {Arrays, Parquet}


@pytest.fixture(scope="module", name="source", params=SOURCES)
def _source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    folder = tmp_path_factory.mktemp("source")
    try:
        yield SOURCES[request.param](folder)
    finally:
        if str(folder) in SERVERS:
            SERVERS.pop(str(folder)).stop()


@pytest.fixture(scope="module", name="reader")
def _reader(source: Source) -> Iterator[Reader]:
    reader = source.open()
    yield reader
    reader.close()


def whole(source: Source, num_lanes: int = 1) -> list[Part]:
    order = Order(source.block_sizes(), num_lanes, seed=3, epoch=0)
    return [part for lane in range(num_lanes) for part in order.slice(lane, 0, order.lane_size(lane))]


def test_it_keeps_to_its_protocols(source: Source, reader: Reader) -> None:
    assert isinstance(source, Source)
    assert isinstance(reader, Reader)


def test_its_blocks_are_its_rows(source: Source) -> None:
    assert sum(source.block_sizes()) == NUM_ROWS


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_gathered_is_what_was_asked_for(source: Source, reader: Reader, data: st.DataObject) -> None:
    filled = [(block, size) for block, size in enumerate(source.block_sizes()) if size]
    chosen = data.draw(st.lists(st.sampled_from(filled), min_size=1, max_size=8))
    parts = [Part(b, np.array(data.draw(st.lists(st.integers(0, size - 1))), np.int64)) for b, size in chosen]
    assert same(reader.gather(parts), twin(source, parts))


@pytest.mark.parametrize("num_lanes", [1, 5, 64])
def test_an_epoch_over_lanes_gives_every_row_once(source: Source, reader: Reader, num_lanes: int) -> None:
    parts = whole(source, num_lanes)
    batch = reader.gather(parts)
    assert same(batch, twin(source, parts))
    assert sorted(columns(batch)[1].tolist()) == LABELS.tolist()


def test_what_is_gathered_is_the_callers_own(source: Source, reader: Reader) -> None:
    for tensor in columns(reader.gather(whole(source))):
        tensor.zero_()
    assert same(reader.gather(whole(source)), twin(source, whole(source)))


def test_announcing_changes_nothing_but_when_it_is_read(source: Source) -> None:
    reader = source.open()
    reader.expect(range(len(source.block_sizes())))
    assert same(reader.gather(whole(source)), twin(source, whole(source)))
    reader.release([0])
    assert same(reader.gather(whole(source)), twin(source, whole(source)))
    reader.close()


def test_threads_gather_at_once(source: Source, reader: Reader) -> None:
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda lanes: reader.gather(whole(source, lanes)), range(1, 17)))
    assert all(same(b, twin(source, whole(source, lanes))) for lanes, b in enumerate(batches, start=1))


def test_it_is_opened_anew_after_a_fork(source: Source, reader: Reader) -> None:
    """As the nursery's workers do: the parent has read, and has threads."""
    reader.gather(whole(source))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            again = source.open()
            code = 0 if same(again.gather(whole(source)), twin(source, whole(source))) else 2
            again.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_it_survives_pickling(source: Source) -> None:
    reader = pickle.loads(pickle.dumps(source)).open()
    assert same(reader.gather(whole(source)), twin(source, whole(source)))
    reader.close()


def test_its_description_is_json_and_holds_no_secret(source: Source) -> None:
    text = json.dumps(source.describe())
    assert type(source).__name__ in text
    assert SECRET not in text
