"""The library's own errors.

A message says what was expected, what came and what to do. So a command line catches :class:`JresnetError`, prints the
message alone and exits with code 1, while a programming mistake still shows its traceback.
"""


class JresnetError(Exception):
    """Anything that jresnet itself has to say against what it was given or found."""


class InputError(JresnetError, ValueError):
    """Something the user gave cannot be used: an argument, a name, a file, a folder."""


class DataError(InputError):
    """A dataset is missing, damaged or not what its layout promises."""


class WeightsError(InputError):
    """A weights file is unreadable, damaged, or belongs to another network."""


class DownloadError(JresnetError, OSError):
    """A file could not be fetched, or what arrived is not what was asked for. It is no ``ValueError``."""
