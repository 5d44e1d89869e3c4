"""The library's own errors.

Every one is a ``ValueError`` whose message says what was expected, what came and what to do, so a command line prints the
message alone and exits with code 1, while a programming mistake still shows its traceback.
"""


class InputError(ValueError):
    """Something the user gave cannot be used: an argument, a name, a file, a folder."""


class DataError(InputError):
    """A dataset is missing, damaged or not what its layout promises."""


class DownloadError(InputError):
    """A file could not be fetched, or what arrived is not what was asked for."""


class WeightsError(InputError):
    """A weights file is unreadable, damaged, or belongs to another network."""
