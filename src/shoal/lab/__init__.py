"""A cluster in a box: hosts as network namespaces of one Linux machine, with shaped links, and faults on demand."""

from shoal.lab.cluster import Host, Lab, discard, labs
from shoal.lab.kernel import why_not
from shoal.lab.spec import LabSpec

__all__ = ["Host", "Lab", "LabSpec", "discard", "labs", "why_not"]
