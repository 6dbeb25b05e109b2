"""How a process of moss_train tells whoever started it why it ended: the one table, also in docs/recovery.md.

An uncaught exception, a fault of the program, is Python's own 1 and keeps its traceback.
"""

DONE = 0
MISTAKE = 2  #: something the user can mend; one line on standard error says what
REQUEUE = 75  #: stopped by SIGTERM or SIGUSR1 and saved: run the same command again (EX_TEMPFAIL of sysexits.h)
STALLED = 80  #: the watchdog found that the job stood still; its report names the rank
PEER_LOST = 81  #: another process of the job is gone
INTERRUPTED = 130  #: Ctrl-C; saved, unless it came twice
