"""The exceptions that vestige raises.

A message has three parts: what was got, what was expected, what to do.
"""

# Notes on an error that stopped several processes, which all have it and of which one tells it.
TOLD_HERE = "told here for all processes of this run"
TOLD_ELSEWHERE = "told by another process of this run"


class VestigeError(Exception):
    """Base of every error that vestige raises on purpose."""


class RecipeError(VestigeError, ValueError):
    """A recipe, a preset or an override is not valid; lists every mistake that was found."""


class DataError(VestigeError, ValueError):
    """A data set is missing or is not in the documented layout."""


class TeacherError(VestigeError, ValueError):
    """A teacher cannot be loaded or does not fit the task."""


class NoBatchNormError(TeacherError):
    """A method needs stored BatchNorm statistics and the teacher has none."""


class AccessError(TeacherError):
    """Something was asked of a teacher that its access level does not offer."""


class QueryBudgetExceeded(TeacherError):
    """A black-box teacher was asked more often than its budget allows."""


class ShapeError(VestigeError, ValueError):
    """A tensor's shape does not fit what was declared."""


class ContractError(VestigeError, RuntimeError):
    """A method or a plug-in broke a rule that training and resuming rely on."""


class ProcessError(VestigeError, RuntimeError):
    """Another process of the same run is gone."""


class RealDataError(VestigeError, PermissionError):
    """Code that must work without data opened a data file while it ran."""


class RejectedUpdateError(VestigeError, ValueError):
    """What a client or a server of a federation sent is not as it must be.

    `reason` says why in few words, the same for all such records, so that they can be counted.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class MissingExtraError(VestigeError, ImportError):
    """An optional package is needed; the message holds the one pip command."""


class CheckpointError(VestigeError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


class ExportError(VestigeError, RuntimeError):
    """A network cannot be written in another form, or would compute something else there."""


class StorageError(VestigeError, OSError):
    """A file could not be written: no space, no permission, something in the way."""


class NonFiniteLossError(VestigeError, ArithmeticError):
    """A loss became NaN or infinite."""


class OutOfMemoryError(VestigeError, MemoryError):
    """Memory of the GPU or of the machine was exhausted; says where and which settings help."""


class Interrupted(VestigeError):
    """The run was stopped from outside; it can be resumed."""
