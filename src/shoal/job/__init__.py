"""What a user writes."""

from shoal.job.code import files_of, hash_job
from shoal.job.job import Balance, Job, Patience, Storing
from shoal.job.loading import load_job
from shoal.job.options import describe, override, parse_settings
from shoal.job.task import Batch, GroupsParameters, Predicts, Task, TensorSpec, Timed

__all__ = [
    "Balance", "Batch", "GroupsParameters", "Job", "Patience", "Predicts", "Storing", "Task", "TensorSpec", "Timed",
    "describe", "files_of", "hash_job", "load_job", "override", "parse_settings",
]  # fmt: skip
