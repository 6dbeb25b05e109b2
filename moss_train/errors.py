"""Errors that a user can cause and mend; the command line prints them as one line and exits with code 2."""


class MossTrainError(Exception):
    """Base of every error whose message is meant for the user: what is wrong, where, and the remedy."""

    told_elsewhere = False  #: another process of the job met the same one and prints it


class ConfigError(MossTrainError):
    """A field of the configuration has an illegal value, or fields contradict each other."""


class SampleError(MossTrainError):
    """One sample breaks the schema or cannot be decoded; the loader quarantines it, tools report it."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"sample {key!r}: {reason}")
        self.key = key
        self.reason = reason


class DataError(MossTrainError):
    """A shard, an index or a whole source is missing, damaged or does not fit the configuration."""


class CheckpointError(MossTrainError):
    """A checkpoint is missing, incomplete, damaged or does not fit the model that should load it."""


class TrainingError(MossTrainError):
    """Training must not go on as it is: too many steps were skipped, or the loss has jumped."""
