"""The version, which ``pyproject.toml`` reads here, and those of other packages."""

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def installed(*names: str) -> dict[str, str]:
    """The versions of distributions by name; "unknown" of one that is imported from a folder and not installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
