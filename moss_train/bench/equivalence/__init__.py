"""Does a layout change a number? Training over forked ranks beside plain training in one process, and the difference."""
