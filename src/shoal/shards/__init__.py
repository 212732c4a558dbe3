"""Table shards: processes that hold tables for many workers, and what workers ask them with."""
