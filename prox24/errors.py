"""Errors that a user can mend: one line that names the file, tensor or argument and what to do."""


class Prox24Error(Exception):
    """Base of the errors that the command line prints as one line, with exit code 2."""


class CheckpointError(Prox24Error):
    """A checkpoint that cannot be read, or a destination that cannot be written."""


class DiskError(CheckpointError):
    """A disk that is full, or fails, or forbids what is asked."""


class UnsupportedModelError(Prox24Error):
    """An architecture, or a setting of one, that has no forward pass here."""


class CalibrationError(Prox24Error):
    """Text that cannot calibrate or evaluate, or activations that are not finite."""


class PromptError(Prox24Error):
    """A prompt that a model cannot go on from."""


class RecipeError(Prox24Error, ValueError):
    """A recipe with a field that is unknown, of a wrong type or out of range."""


class SolverError(Prox24Error):
    """A layer for which no solution was found."""


class MissingPackageError(Prox24Error, ImportError):
    """A package of an extra is not installed."""


def missing_package(
    user: str, error: ModuleNotFoundError, extra: str = "llm"
) -> MissingPackageError | None:
    """The error for a package that is not installed; None for a module of prox24 itself."""
    package = (error.name or "prox24").partition(".")[0]
    if package == "prox24":
        return None
    return MissingPackageError(f"{user} needs the package {package}: pip install 'prox24[{extra}]'")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]
