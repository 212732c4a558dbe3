"""What others take to recover from the same kill, each in an environment of its own."""
