"""Does a layout change a number? Training over forked ranks, plain training in one process, and the difference."""
