"""One script a claim: ``python -m benchmarks.NAME [--quick]``. The last line is one JSON object."""
