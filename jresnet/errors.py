"""The exceptions that jresnet raises.

A message says what was expected, what was found and what to do. A command line therefore catches :class:`JresnetError`,
prints only the message and exits with code 1, while a programming error still shows its traceback.
"""


class JresnetError(Exception):
    """The base class of all exceptions that jresnet defines."""


class InputError(JresnetError, ValueError):
    """The user passed an argument, a name, a file or a folder that cannot be used."""


class DataError(InputError):
    """A data set is missing or damaged, or does not have the expected layout."""


class WeightsError(InputError):
    """A weights file is unreadable or damaged, or belongs to another network."""


class DownloadError(JresnetError, OSError):
    """A file could not be downloaded, or its content is not the expected one. Not a subclass of ``ValueError``."""
