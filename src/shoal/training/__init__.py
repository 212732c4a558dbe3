"""The loops: what a worker does, and what the coordinator does."""
