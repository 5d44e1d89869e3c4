"""The command ``jresnet`` and its subcommands, such as ``jresnet train``; ``python -m jresnet`` is the same.

Importing this module does not import JAX, so that ``jresnet --help`` is quick: the module of a subcommand is imported only
when it runs. Other packages can add subcommands by entry points in the group ``jresnet.commands``: functions of (arguments,
``prog``) that return an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from jresnet.commands import huge_pages
from jresnet.commands.flags import Parser
from jresnet.errors import InputError, JresnetError
from jresnet.files import shown
from jresnet.version import __version__

OWN = {  # modules of this package
    "train": "train a ResNet on CIFAR-10, CIFAR-100 or digits",
    "train-imagenet": "train from scratch on ImageNet, or on any images sorted by class",
    "evaluate": "compute accuracy and loss of weights on labelled images",
    "finetune": "fine-tune pretrained weights on your own images, such as a folder of photos",
    "predict": "classify images: names of classes and probabilities",
    "push": "write weights with a model card to the Hugging Face Hub, or to a folder",
    "pull": "fetch weights from the Hugging Face Hub, or from such a folder, into a file",
    "export": "export a model as a program for JAX or ONNX that runs without jresnet",
    "report": "compare training runs in a table and a plot",
    "info": "print versions, devices, compilation cache and compiler options",
}
PLACES = {
    "push": ("share", "push"),
    "pull": ("share", "pull"),
    "train-imagenet": ("train_imagenet", "main"),
}  # (module, function) of commands that are not the function main of a module with the command's name
COMPUTING = ("train", "train-imagenet", "evaluate", "finetune", "predict")  # commands that benefit from huge pages
SLOW = (*COMPUTING, "convert", "export-torch")  # commands that import JAX and then run for a while
PRINTING = ("info", "evaluate", "predict")  # commands that print their result
OTHERS = {  # commands of the package convert, which is installed with jresnet
    "convert": "convert PyTorch weights to a native file",
    "export-torch": "convert a native file to PyTorch weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the console command; returns its exit code, or ends the process after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in COMPUTING:
        huge_pages.ask()
    return ended(dispatch(arguments))


def script(name: str, prog: str) -> int:
    """The entry point of a script for one of the subcommands; returns as :func:`main`."""
    huge_pages.ask()
    return ended(run(name, sys.argv[1:], prog))


def ended(code: int) -> int:
    """Returns the exit code; after a signal it ends the process instead."""
    if code > 128:  # a thread may still be compiling, and Python would wait for it
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    return code


def dispatch(arguments: Sequence[str]) -> int:
    """Runs the subcommand that the arguments name and returns its exit code."""
    found = _registered()
    names = OWN | {name: OTHERS.get(name, entry.value) for name, entry in found.items()}
    width = max(map(len, names))
    parser = Parser(
        prog="jresnet",
        description="ResNets in JAX: training, evaluation, and conversion of weights from and to PyTorch.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {line}\n" for name, line in names.items())
        + "\njresnet COMMAND --help shows the options of a command. convert, export-torch and commands of other\n"
        "packages are available if jresnet is installed (pip install -e . in a checkout).\n"
        "Exit code: 0 on success; 1 on an error; 2 for invalid options; 128 + N after signal N.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=names, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    args = parser.parse_args(arguments)
    return run(args.command, args.arguments, f"jresnet {args.command}")


def run(name: str, arguments: Sequence[str] | None, prog: str) -> int:
    """Runs a subcommand, and prints errors as one line on stderr.

    Args:
        name: name of the subcommand.
        arguments: its arguments; None: those of the process.
        prog: name of the program in messages.

    Returns:
        The exit code: 0 on success, 1 on an error, 2 for invalid options, 128 + N after signal N.
    """
    # XLA of jax 0.10.1 prints pages of irrelevant warnings when it loads a cached program on a CPU with AVX-512. Real
    # failures raise exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    def command() -> int:
        greet(name, sys.argv[1:] if arguments is None else arguments)
        return _command(name)(arguments, prog=prog)

    return guarded(command, name)


def guarded(command: Callable[[], int], name: str) -> int:
    """Calls ``command`` and returns its exit code; exceptions are printed as one line. ``name`` is the command's name."""
    if sys.stdout is None:  # closed before the process started
        if name in PRINTING:
            return failed(
                f"standard output is closed, but {name} prints its result there: redirect it to a file or /dev/null"
            )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return guarded(command, name)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    try:
        return command()
    except SystemExit as end:  # raised by argparse
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:  # for example with "| head"
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it at exit
        return 141
    except (JresnetError, OSError) as error:  # OSError: a full disk, for example
        return failed(str(error))
    except ModuleNotFoundError as error:
        return failed(f"{error}: install the packages that {name} needs with pip install -e '.[train]'")
    except ImportError as error:  # installed, but cannot be loaded: too little memory, or an incompatible version
        return failed(f"{name} cannot be started: {' '.join(str(error).split())}")
    except MemoryError:
        return failed("out of memory: raise the limit (ulimit -v), or use a smaller batch or network")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def greet(name: str, arguments: Sequence[str]) -> None:
    """Prints the first line of a slow command, because importing JAX takes seconds."""
    if name in SLOW and not {"-h", "--help", "--json", "--csv"} & set(arguments):
        with contextlib.suppress(BrokenPipeError):  # with "| head -0", the next print raises it again
            print(f"jresnet  {__version__}, starting JAX ...", flush=True)


def check_devices() -> None:
    """Starts JAX.

    Raises:
        InputError: JAX finds no device of the requested kind.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax 0.10.1 raises the latter for a platform without a plugin
        reason = " ".join(str(error).split()) or "this installation has no such platform"
        told = os.environ.get("JAX_PLATFORMS")
        advice = f"JAX_PLATFORMS is {told}: " if told else ""
        raise InputError(
            f"JAX found no device ({reason[:300]}). {advice}install jax for this device, or set JAX_PLATFORMS=cpu"
        ) from error


def failed(message: str) -> int:
    """Prints an error on stderr and returns exit code 1."""
    if sys.stderr is not None:  # None: stderr is closed, and print would use stdout
        print(f"error: {shown(message)}", file=sys.stderr)
    return 1


def _command(name: str) -> Callable[..., int]:
    if name in OWN:
        module, function = PLACES.get(name, (name, "main"))
        return getattr(import_module(f"jresnet.commands.{module}"), function)
    return _registered()[name].load()


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="jresnet.commands") if entry.name not in OWN}
