"""The errors mixgrain raises; each also is the standard error a caller would expect."""


class MixgrainError(Exception):
    """Base of every error that mixgrain raises on purpose."""


class LayoutError(MixgrainError, ValueError):
    """A pattern or layout that cannot be built, does not hold these values, or has no such cell."""


class ShapeError(MixgrainError, ValueError):
    """Tensor shapes that do not fit each other or the layout."""


class DtypeError(MixgrainError, TypeError):
    """A dtype that the operation does not take."""


class UnsupportedError(MixgrainError, NotImplementedError):
    """Something that exists nowhere in mixgrain, or not on this device; names what does."""


class BackendUnavailableError(MixgrainError, RuntimeError):
    """A backend that this machine or installation lacks; names the extra to install."""


class FileFormatError(MixgrainError, ValueError):
    """A file that is not what it claims to be; names the field at fault."""
