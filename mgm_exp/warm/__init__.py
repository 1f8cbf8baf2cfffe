"""Worker processes that stay: runs one after another in a process that has its imports, and the base model, already.

``hydra/launcher=warm``, the default of sweeps on this machine. :mod:`.protocol` is what is said between the sweep and
a worker, :mod:`.worker` is the worker's side, :mod:`.slots` the sweep's. See docs/launchers.md.
"""
