"""Conversion of weights from and to PyTorch: the commands, :func:`convert`, and the comparison with PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.torch2flax import convert as convert

__all__ = ["convert"]


if not TYPE_CHECKING:  # with a module-level __getattr__, type checkers accept any name

    def __getattr__(name: str) -> Any:
        """Imports ``convert`` lazily: its module also runs as a command and must not be imported before that."""
        if name != "convert":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from convert.torch2flax import convert

        return convert
