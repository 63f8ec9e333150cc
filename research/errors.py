"""The one root of all mistakes that a user can make and mend."""


class UserError(Exception):
    """A mistake in what the user gave (a file, a value, a path): reported in full, exit code 1.

    `problems` holds one sentence per mistake; each names the path, the value and what would be valid.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(UserError):
    """A configuration, study or cluster file does not say something that can be run."""


class DataError(UserError):
    """A corpus, archive or text file is missing, changed or not what it was said to be."""


class CheckpointError(UserError):
    """A checkpoint cannot be used: other format, other configuration, or damaged."""


class DiskFull(UserError):
    """A file could not be written for want of room; what stood at its place before stands there still."""


class CollectiveFailed(UserError):
    """The workers of one run could not speak to each other: one is gone, or (`timed_out`) does not answer within the time limit."""

    def __init__(self, *problems: str, timed_out: bool = False) -> None:
        super().__init__(*problems)
        self.timed_out = timed_out


class OutOfMemory(UserError):
    """The device (or this machine) has not the memory that was asked for.

    `asked` and `free` are in bytes, None where the allocator did not say.
    """

    def __init__(self, *problems: str, asked: int | None = None, free: int | None = None) -> None:
        super().__init__(*problems)
        self.asked, self.free = asked, free
