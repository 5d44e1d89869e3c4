"""Run a stranger's pickle without running anything of his: one interpreter for PyTorch's files and CIFAR-10's batches.

A pickle is a program: it may name any function and call it. So this module never hands one to Python's unpickler.
Restricting that (``find_class``) leaves other doors open: BUILD sets attributes, NEWOBJ and EXT make objects, a memo
index of 2^31 makes the C version reserve gigabytes. Here a small interpreter runs the opcodes that plain data needs and
no others. A global's name is looked up in a table that the caller gives, an allow-list of the caller's own functions and
constants, and nothing is imported: the worst program can build dicts, lists, tuples, numbers, strings, and what the
table's functions make.

Where a caller wants it (``inert``), a class or function that the table lacks becomes an :class:`Unknown`, and what a pickle
makes with it a :class:`Record`, which keeps the attributes that it was given and does nothing. Those of Python's own
library are refused all the same, but for a few that hold values: no honest file needs ``os.system``.

What a pickle of a file of S bytes costs is bounded before it is spent: it may run half a million instructions and S / 64
more.
"""

import pickle as op  # the opcodes' names only: nothing here is unpickled by it
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, ClassVar

from jresnet.files import printable

FREE_STEPS = 500_000  # instructions that any pickle may run: 11,000 tensors. One costs about 100 bytes of memory,
BYTES_PER_STEP = 64  # so a larger file may run one more for so many bytes

# What Python raises at opcodes and operands that make no sense; the interpreter leaves it to it to object.
DAMAGE = (ValueError, TypeError, LookupError, OverflowError, EOFError, RuntimeError, AttributeError, struct.error)


class Refused(Exception):
    """Why a file is not read: a sentence that goes on after the file's name."""


class Instance:
    """An object that a pickle describes: the arguments it was made from, and the state that BUILD gave it.

    Nothing is made of either, so nothing is allocated or run.
    """

    __slots__ = ("args", "state")

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None


class Unknown:
    """A class or a function that no table has; nothing is imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """What a pickle says that an :class:`Unknown` made: its arguments, its state, and the items of a dict or a list."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: dict[Any, Any] | list[Any] | None = None


# Of Python's own library, what holds values and may stand beside a network.
HARMLESS = re.compile(
    r"(builtins|__builtin__)\.(set|frozenset|slice|range|xrange|bytearray|complex|object|dict|list|tuple|int|long|float|bool|str|unicode"
    r"|bytes|type)|copy_?reg\._reconstructor|functools\.partial|collections\.(defaultdict|deque|UserDict)|types\.SimpleNamespace"
    r"|(pathlib|datetime|decimal|fractions|uuid|enum|typing|dataclasses|inspect)\.[\w.]+|pathlib\._local\.\w+|logging\.Logger"
)

_FIXED = {  # opcode: struct format of its operand
    op.PROTO: "<B", op.FRAME: "<Q", op.BININT: "<i", op.BININT1: "<B", op.BININT2: "<H", op.BINFLOAT: ">d",
    op.BINGET: "<B", op.LONG_BINGET: "<I", op.BINPUT: "<B", op.LONG_BINPUT: "<I",
}  # fmt: skip
_COUNTED = {  # opcode: struct format of the length that precedes its operand
    op.SHORT_BINUNICODE: "<B", op.BINUNICODE: "<I", op.BINUNICODE8: "<Q", op.SHORT_BINSTRING: "<B", op.BINSTRING: "<i",
    op.SHORT_BINBYTES: "<B", op.BINBYTES: "<I", op.BINBYTES8: "<Q", op.LONG1: "<B",
}  # fmt: skip
_POPS = {  # opcode: how many values it takes from the stack
    op.TUPLE1: 1, op.TUPLE2: 2, op.TUPLE3: 3, op.APPEND: 1, op.SETITEM: 2, op.BUILD: 1, op.BINPERSID: 1,
    op.STACK_GLOBAL: 2, op.REDUCE: 2, op.NEWOBJ: 2, op.STOP: 1,
}  # fmt: skip
_POPS_TO_MARK = (op.TUPLE, op.APPENDS, op.SETITEMS)
_PYTHON = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "cPickle"}  # the last of Python 2
_CONSTANTS = {op.NONE: None, op.NEWTRUE: True, op.NEWFALSE: False, op.EMPTY_TUPLE: ()}


def expect(value: Any, *types: type) -> Any:
    """``value``, if its type is exactly one of ``types``: what a stranger's pickle made is not used before."""
    if type(value) not in types:
        raise ValueError(f"a {type(value).__name__} where {types[0].__name__} belongs")
    return value


class Interpreter:
    """Runs the pickles at the beginning of ``data``, one a :meth:`load`.

    Args:
        data: one pickle or several, one after the other.
        allowed: by full name, such as ``"numpy.dtype"``, what stands for each global that a pickle may name: a function
            that takes the interpreter before the pickle's arguments and checks all that it uses, or a constant.
        size: bytes of the whole file, by which the number of instructions is bounded; ``None``: of ``data``.
        inert: make an :class:`Unknown` of a global that ``allowed`` lacks, unless it is Python's own.
        bytes_of_python2: read Python 2's ``str`` as bytes, else as text in UTF-8.
        advice: the end of every refusal: what is read, and what to do.

    Raises:
        Refused: for what is never run, and for a pickle that costs too much.
        DAMAGE: one of these, for a pickle that makes no sense.
    """

    hints: ClassVar[Mapping[str, str]] = {}  # beginnings of globals' names: better advice where one is forbidden

    def __init__(
        self,
        data: bytes,
        allowed: Mapping[str, object],
        *,
        size: int | None = None,
        inert: bool = False,
        bytes_of_python2: bool = False,
        advice: str,
    ):
        self.data, self.allowed, self.advice, self.position = data, allowed, advice, 0
        self.size = size = len(data) if size is None else size
        self.inert, self.bytes_of_python2 = inert, bytes_of_python2
        self.steps = self.limit = FREE_STEPS + size // BYTES_PER_STEP

    def load(self) -> Any:
        """The object of the next pickle."""
        stack: list[Any] = []
        marks: list[list[Any]] = []  # the stacks below each open MARK
        memo: dict[int, Any] = {}
        arg: Any
        items: list[Any]
        while True:
            self.charge(1)
            code, arg, items = self.take(1), None, []
            if code in _FIXED:
                arg = self.number(_FIXED[code])
            elif code in _COUNTED:
                arg = self.take(self.number(_COUNTED[code]))
            elif code in _POPS:
                items = [stack.pop() for _ in range(_POPS[code])][::-1]
            elif code in _POPS_TO_MARK:
                stack, items = marks.pop(), stack
            match code:
                case op.BINPUT | op.LONG_BINPUT | op.MEMOIZE:
                    memo[len(memo) if arg is None else arg] = stack[-1]
                case op.BINGET | op.LONG_BINGET:
                    stack.append(memo[arg])
                case op.BINUNICODE | op.SHORT_BINUNICODE | op.BINUNICODE8:
                    stack.append(arg.decode())
                case op.SHORT_BINSTRING | op.BINSTRING:
                    stack.append(arg if self.bytes_of_python2 else arg.decode())
                case op.LONG1:
                    stack.append(int.from_bytes(arg, "little", signed=True))
                case op.BININT | op.BININT1 | op.BININT2 | op.BINFLOAT | op.SHORT_BINBYTES | op.BINBYTES | op.BINBYTES8:
                    stack.append(arg)
                case op.NONE | op.NEWTRUE | op.NEWFALSE | op.EMPTY_TUPLE:
                    stack.append(_CONSTANTS[code])
                case op.EMPTY_LIST:
                    stack.append([])
                case op.EMPTY_DICT:
                    stack.append({})
                case op.MARK:
                    marks.append(stack)
                    stack = []
                case op.TUPLE | op.TUPLE1 | op.TUPLE2 | op.TUPLE3:
                    stack.append(tuple(items))
                case op.APPEND | op.APPENDS:
                    self.items_of(stack[-1], list).extend(items)
                case op.SETITEM | op.SETITEMS:
                    self.fill(self.items_of(stack[-1], dict, OrderedDict), zip(items[::2], items[1::2], strict=True))
                case op.GLOBAL:
                    stack.append(self.named(self.line(), self.line()))
                case op.STACK_GLOBAL:
                    stack.append(self.named(*items))
                case op.REDUCE | op.NEWOBJ:
                    function, arguments = items[0], expect(items[1], tuple)
                    if type(function) is Unknown:
                        stack.append(Record(function.name, arguments))
                    else:
                        stack.append(expect(function, FunctionType)(self, *arguments))
                case op.BUILD:
                    self.build(stack[-1], items[0])
                case op.BINPERSID:
                    stack.append(self.persistent(*expect(items[0], tuple)))
                case op.PROTO | op.FRAME:
                    if arg > (5 if code == op.PROTO else len(self.data) - self.position):
                        raise ValueError(f"a pickle protocol or frame of {arg}")
                case op.STOP:
                    return items[0]
                case _:
                    raise Refused(f"has the pickle opcode 0x{code.hex()}, which is not run; {self.advice}")

    def charge(self, steps: int) -> None:
        """Pay for an instruction, or for each element that one copies: few bytes must not become many objects."""
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"holds a pickle that builds far more than its {self.size:,} bytes hold; {self.advice}")

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.position:
            raise EOFError(f"{count:,} bytes more expected where the file, or its first {len(self.data):,} bytes, end")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    # What a pickle may cause. The arguments are a stranger's: each function checks all that it uses.

    def named(self, module: Any, name: Any) -> object:
        """What the allow-list has for a global."""
        full = f"{expect(module, str)[:200]}.{expect(name, str)[:200]}"
        if full not in self.allowed:
            if self.inert and self.is_inert(full):
                return Unknown(full)
            advice = next((text for begin, text in self.hints.items() if full.startswith(begin)), self.advice)
            raise Refused(f"names the forbidden global {printable(full)}, which this reader never runs; {advice}")
        return self.allowed[full]

    def is_inert(self, full: str) -> bool:
        """Whether a global that no table has may become an :class:`Unknown`, and is not refused."""
        python = full.partition(".")[0] in _PYTHON
        return HARMLESS.fullmatch(full) is not None or not python

    def items_of(self, target: Any, *types: type) -> Any:
        """What APPENDS and SETITEMS fill: a list or a dict, or that of a :class:`Record`."""
        if type(target) is not Record:
            return expect(target, *types)
        if target.items is None:
            target.items = types[0]()
        return expect(target.items, *types)

    def persistent(self, *_: Any) -> Any:
        """A persistent id, by which a pickle names what lies beside it."""
        raise Refused(f"names something outside its pickle; {self.advice}")

    def fill(self, target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        for key, value in pairs:
            self.charge(1)
            if self.inert and type(key) in (Record, Unknown, tuple):
                continue  # of an optimizer's state, say, which nobody reads
            # No tuples: to hash nested ones can take exponential time. No huge integers: they can be made to collide.
            if type(expect(key, str, int, float, bool, bytes, type(None))) is int and key.bit_length() > 64:
                raise ValueError("an integer of more than 64 bits as a key")
            target[key] = value
        return target

    def build(self, target: Any, state: Any) -> None:
        """BUILD, which sets attributes."""
        expect(target, Instance, Record).state = state

    def encode(self, text: Any, codec: Any) -> bytes:
        """``_codecs.encode``, as protocol 2 spells bytes."""
        self.charge(len(expect(text, str)) // BYTES_PER_STEP)
        if expect(codec, str) != "latin1":
            raise ValueError("bytes in another encoding than latin1")
        return text.encode("latin1")
