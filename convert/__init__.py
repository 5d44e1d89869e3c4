"""Weights from PyTorch and back: the commands, the function :func:`convert`, and the check against PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.torch2flax import convert as convert

__all__ = ["convert"]


if not TYPE_CHECKING:  # type checkers would take any name at all

    def __getattr__(name: str) -> Any:
        """``convert``, from a module that must not be imported before it is run as a command."""
        if name != "convert":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from convert.torch2flax import convert

        return convert
