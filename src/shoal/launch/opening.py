"""From where a model is to what answers with it: for a model's process, which opens one version after another."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import ConfigError
from shoal.job import Job
from shoal.launch.exporting import is_package
from shoal.launch.using import first_samples, job_of, measured, read_version, untabled
from shoal.service.child import Opened
from shoal.service.wire import Source
from shoal.serving import ModelPredictor
from shoal.serving.package import read
from shoal.serving.packaged import probe_of, with_code
from shoal.shards import has_tables
from shoal.training.folder import RunFolder
from shoal.versions import Store, Versions

if TYPE_CHECKING:
    from shoal.shards.reading import StoredTables

_NUM_PROBED = 32


class Sources:
    """Opens packages, and versions of one run after another: of that, the job is loaded once, and tables that are here
    already are brought to a later version by what has come since."""

    def __init__(self) -> None:
        self._job: tuple[str, Job] | None = None
        self._tables: tuple[str, StoredTables] | None = None

    def prepare(self, source: Source) -> None:
        """As ``Opener``."""
        if not is_package(Path(source.path)):
            first_samples(self._job_of(RunFolder(Path(source.path))), _NUM_PROBED)

    def open(self, source: Source) -> Opened:
        """As ``Opener``."""
        if is_package(Path(source.path)):
            if source.job_file is None:
                raise ConfigError(f"{source.path} holds no code: give its task's file with --job")
            package = read(Path(source.path), None if source.signed_by is None else Path(source.signed_by))
            job, predictor = with_code(package, Path(source.job_file))
            return Opened(predictor=predictor, probe=package.probe, measure=lambda: _measured(job, predictor))
        return self._open_version(RunFolder(Path(source.path)), source)

    def _open_version(self, folder: RunFolder, source: Source) -> Opened:
        job = self._job_of(folder)
        snapshot = read_version(folder, source.version)
        served = untabled(folder, snapshot, job)
        by_delta = has_tables(served.model) and self._read_tables(served, folder, snapshot.step)
        created_at = Versions(Store(folder.read_record()["store"])).manifest(snapshot.step).created_at
        return Opened(
            predictor=served,
            probe=probe_of(served, first_samples(job, _NUM_PROBED)),
            measure=lambda: _measured(job, served),
            by_delta=by_delta,
            stored_s=datetime.fromisoformat(created_at).timestamp(),
        )

    def _job_of(self, folder: RunFolder) -> Job:
        if self._job is None or self._job[0] != str(folder.path):
            self._job, self._tables = (str(folder.path), job_of(folder)), None
        return self._job[1]

    def _read_tables(self, served: ModelPredictor, folder: RunFolder, step: int) -> bool:
        """Whether it was enough to read what is new."""
        from shoal.shards.embedding import embeddings_of
        from shoal.shards.reading import stored_tables

        known, self._tables = self._tables, None
        path = str(folder.path)
        by_delta = known is not None and known[0] == path and known[1].advance(step)
        tables = known[1] if known is not None and by_delta else stored_tables(folder.path, step)
        self._tables = (path, tables)
        for module in embeddings_of(served.model):
            module.source = tables
        return by_delta


def _measured(job: Job, predictor: ModelPredictor) -> dict[str, object]:
    return measured(job, predictor.model) if job.test is not None else {}
