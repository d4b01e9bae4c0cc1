"""What a command's exit code means; docs/training.md lists them too."""

OK = 0
"""Finished."""
FAILED = 1
"""An error nobody foresaw; the traceback is printed."""
USAGE = 2
"""A flag, value, file or checkpoint that cannot work; one line says which, nothing was done."""
DIVERGED = 3
"""Too many steps in a row were not finite or spiked; a checkpoint was saved."""
STORAGE = 4
"""A file could not be written or no good checkpoint could be read."""
CLUSTER = 69
"""The other processes were not to be reached in time (sysexits' EX_UNAVAILABLE); trying again may
help."""
PREEMPTED = 75
"""SIGTERM: the state was saved; run the same command with --resume (sysexits' EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Ctrl-C: the state was saved, as after SIGTERM."""
