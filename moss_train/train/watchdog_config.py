"""How patient the watchdog is."""

from dataclasses import dataclass

from moss_train.errors import ConfigError


@dataclass
class WatchdogConfig:
    """When a run counts as stalled."""

    stall_s: float | None = 50.0
    """Seconds without a sign of life of the process that the others wait for until the job is ended with a report;
    null never ends it so, for example under a debugger. A process that dies ends the others in either case."""
    start_s: float = 1800.0
    """The same before a stage's second step, and for the first checkpoint and evaluation, of which nobody knows yet how
    long they take: loading, compiling, measuring lengths."""
    slow_factor: float = 3.0
    """A phase that has healthily been without a sign of life for longer gets this many times that, if it is more; in a
    stage's second step, of whose kind nothing is known yet, as long as in the first."""

    def validate(self) -> None:
        """Raise ConfigError for the first illegal value."""
        if self.stall_s is not None and not self.stall_s > 0:
            raise ConfigError(f"watchdog.stall_s={self.stall_s}: must be above 0 seconds, or null to switch it off")
        if not self.start_s >= (self.stall_s or 0):
            raise ConfigError(
                f"watchdog.start_s={self.start_s}: a start takes longer than a step, give at least "
                f"watchdog.stall_s={self.stall_s}"
            )
        if not self.slow_factor >= 1:
            raise ConfigError(f"watchdog.slow_factor={self.slow_factor}: must be at least 1")
