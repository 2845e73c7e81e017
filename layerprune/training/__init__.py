"""The training program: data, loop, checkpoints, records and report of a run."""
