"""The version of jresnet, which ``pyproject.toml`` reads from here, and those of installed packages."""

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def installed(*names: str) -> dict[str, str]:
    """The versions of distributions by name; "unknown" for a package that is imported from a folder without installation."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
