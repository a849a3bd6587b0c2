"""The few kinds of error that a user can meet; every message says what to do next."""


class MsfpError(Exception):
    """A task that failed for a reason the user can act on (exit code 1)."""

    exit_code = 1


class UsageError(MsfpError):
    """A wrong argument, found before any work was done (exit code 2)."""

    exit_code = 2


class RunError(MsfpError):
    """A run directory that is absent, incomplete or made by another recipe."""


class CheckpointError(MsfpError):
    """A file of ours that is truncated, altered, or written by a newer version."""


class ModelError(MsfpError):
    """A pipeline that cannot be found, loaded, or quantized."""


class CalibrationError(MsfpError):
    """Activations that cannot be calibrated, for instance because they hold a NaN."""


class TrainingError(MsfpError):
    """A fine-tuning that diverged or does not fit into memory."""
