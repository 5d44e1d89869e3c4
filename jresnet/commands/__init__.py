"""The command ``jresnet`` and its subcommands, ``jresnet train`` and so on; ``python -m jresnet`` is the same.

Importing this needs no jax, so that ``jresnet --help`` answers at once: a subcommand's module is imported when it is asked
for. Other packages add subcommands by entry points in the group ``jresnet.commands``, functions of (arguments, ``prog``)
that return an exit code.
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
    "train-imagenet": "train from scratch on ImageNet, or images by class in any number",
    "evaluate": "accuracy and loss of weights on labelled images",
    "finetune": "trained weights for one's own images: a folder of photos",
    "predict": "what is in images: names and probabilities",
    "push": "weights with their model card to the Hugging Face Hub, or into a folder",
    "pull": "weights from the Hugging Face Hub, or from such a folder, into a file",
    "export": "a model as a program for JAX or ONNX that runs without jresnet",
    "report": "compare training runs in a table and a plot",
    "info": "versions, devices, compilation cache and compiler options",
}
PLACES = {
    "push": ("share", "push"),
    "pull": ("share", "pull"),
    "train-imagenet": ("train_imagenet", "main"),
}  # where it is not the main of a module of the name
COMPUTING = ("train", "train-imagenet", "evaluate", "finetune", "predict")  # those that gain from large pages
SLOW = (*COMPUTING, "convert", "export-torch")  # those that import JAX and then work for a while
PRINTING = ("info", "evaluate", "predict")  # those whose result is what they print
OTHERS = {  # of the package convert, which comes with jresnet
    "convert": "turn PyTorch's weights into a file of jresnet's",
    "export-torch": "turn a file of jresnet's into PyTorch's weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The whole process of the console command; returns its exit code, or ends the process after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in COMPUTING:
        huge_pages.ask()
    return ended(dispatch(arguments))


def script(name: str, prog: str) -> int:
    """The whole process of a script that is one of the subcommands; returns as :func:`main`."""
    huge_pages.ask()
    return ended(run(name, sys.argv[1:], prog))


def ended(code: int) -> int:
    """The exit code; after a signal the process ends here."""
    if code > 128:  # a compiler may still be at work in a thread, and Python would wait for it
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    return code


def dispatch(arguments: Sequence[str]) -> int:
    """Runs the subcommand that the arguments name; returns its exit code."""
    found = _registered()
    names = OWN | {name: OTHERS.get(name, entry.value) for name, entry in found.items()}
    width = max(map(len, names))
    parser = Parser(
        prog="jresnet",
        description="ResNets in JAX: training, evaluation, and weights from and for PyTorch.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {line}\n" for name, line in names.items())
        + "\njresnet COMMAND --help shows a command's options. Commands of other packages, convert and export-torch\n"
        "among them, are known where jresnet is installed (pip install -e . in a checkout).\n"
        "Exit code: 0; 1 for what cannot be used; 2 for bad options; 128 + the signal's number.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=names, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    args = parser.parse_args(arguments)
    return run(args.command, args.arguments, f"jresnet {args.command}")


def run(name: str, arguments: Sequence[str] | None, prog: str) -> int:
    """Runs a subcommand, and tells what goes wrong in one line on stderr.

    Args:
        name: of the subcommand.
        arguments: its own; None for those of the process.
        prog: what it calls itself in messages.

    Returns:
        The exit code: 0, 1 for what cannot be used, 2 for bad options, 128 + signal.
    """
    # XLA of jax 0.10.1 prints screens of nothing where it loads a kept program on a CPU with AVX-512. What really fails is
    # an exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    def command() -> int:
        greet(name, sys.argv[1:] if arguments is None else arguments)
        return _command(name)(arguments, prog=prog)

    return guarded(command, name)


def guarded(command: Callable[[], int], name: str) -> int:
    """What ``command`` returns, or the exit code for what it raises, which is told in one line; ``name`` is what it is."""
    if sys.stdout is None:  # closed before the start
        if name in PRINTING:
            return failed(
                f"the standard output, where {name} prints its result, is closed: give it a file, or /dev/null"
            )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return guarded(command, name)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        return command()
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:  # as with "| head"
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tells of it at its end
        return 141
    except (JresnetError, OSError) as error:  # OSError: a disk that fills up, for example
        return failed(str(error))
    except ModuleNotFoundError as error:
        return failed(f"{error}: install what {name} needs with pip install -e '.[train]'")
    except ImportError as error:  # it is there and does not load: too little memory, or a library of another version
        return failed(f"{name} cannot be started: {' '.join(str(error).split())}")
    except MemoryError:
        return failed("the memory is used up: give more of it (ulimit -v), or take a smaller batch or network")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def greet(name: str, arguments: Sequence[str]) -> None:
    """The first line of a command that computes: JAX takes seconds to import, in which one would see nothing."""
    if name in SLOW and not {"-h", "--help", "--json", "--csv"} & set(arguments):
        with contextlib.suppress(BrokenPipeError):  # "| head -0": what is printed next tells guarded
            print(f"jresnet  {__version__}, starting JAX ...", flush=True)


def check_devices() -> None:
    """Starts JAX.

    Raises:
        InputError: where it finds none of the devices that it was told to use.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of jax 0.10.1 for a platform without a plugin
        reason = " ".join(str(error).split()) or "this installation knows no such platform"
        told = os.environ.get("JAX_PLATFORMS")
        advice = f"JAX_PLATFORMS is {told}: " if told else ""
        raise InputError(
            f"JAX has no device to compute on ({reason[:300]}). {advice}install jax for this device, or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def failed(message: str) -> int:
    """Tells an error; returns the exit code 1."""
    if sys.stderr is not None:  # closed: print would take stdout
        print(f"error: {shown(message)}", file=sys.stderr)
    return 1


def _command(name: str) -> Callable[..., int]:
    if name in OWN:
        module, function = PLACES.get(name, (name, "main"))
        return getattr(import_module(f"jresnet.commands.{module}"), function)
    return _registered()[name].load()


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="jresnet.commands") if entry.name not in OWN}
