"""Collectives, encrypted links and transfers. The only importer of torch.distributed and zmq."""
