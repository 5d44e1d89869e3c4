"""Interprets untrusted pickles without executing code from them; used for PyTorch's files and CIFAR-10's batches.

A pickle is a program that can call any function. So this module never passes one to Python's unpickler. Restricting
``find_class`` would not suffice: BUILD sets attributes, NEWOBJ and EXT create objects, and a memo index of 2^31 makes the C
implementation allocate gigabytes. Instead, a small interpreter runs only the opcodes that plain data needs. Names of globals
are looked up in an allow-list of functions and constants that the caller provides, and nothing is imported. A malicious
pickle can at most build dicts, lists, tuples, numbers, strings, and the results of the allowed functions.

With ``inert=True``, a class or function that is not in the allow-list becomes an :class:`Unknown`. An object that the pickle
creates with it becomes a :class:`Record`, which only stores the attributes. Globals of Python's standard library are refused
nevertheless, except for a few types that hold values: no legitimate file needs ``os.system``.

The cost is limited in advance: the pickle of a file of S bytes may run 500,000 + S / 64 instructions.
"""

import pickle as op  # only for the opcodes; it is never used to unpickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, ClassVar

from jresnet.files import printable

FREE_STEPS = 500_000  # instructions that any pickle may run, enough for 11,000 tensors; each takes about 100 bytes
BYTES_PER_STEP = 64  # a pickle may run one more instruction for so many bytes of its file

# Exceptions that Python raises for invalid opcodes and operands; the interpreter does not check these cases itself.
DAMAGE = (ValueError, TypeError, LookupError, OverflowError, EOFError, RuntimeError, AttributeError, struct.error)


class Refused(Exception):
    """A file is refused. The message continues a sentence that begins with the file's name."""


class Instance:
    """An object that a pickle describes: the arguments of its constructor and the state that BUILD set.

    The object itself is not created, so nothing is allocated or executed.
    """

    __slots__ = ("args", "state")

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None


class Unknown:
    """A class or function that is not in the allow-list; it is not imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """An object that a pickle creates with an :class:`Unknown`: arguments, state, and the items of a dict or list."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: dict[Any, Any] | list[Any] | None = None


# Types of Python's standard library that only hold values and may occur in checkpoints.
HARMLESS = re.compile(
    r"(builtins|__builtin__)\.(set|frozenset|slice|range|xrange|bytearray|complex|object|dict|list|tuple|int|long|float|bool|str|unicode"
    r"|bytes|type)|copy_?reg\._reconstructor|functools\.partial|collections\.(defaultdict|deque|UserDict)|types\.SimpleNamespace"
    r"|contextlib\.nullcontext"
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
_POPS = {  # opcode: number of values it pops from the stack
    op.TUPLE1: 1, op.TUPLE2: 2, op.TUPLE3: 3, op.APPEND: 1, op.SETITEM: 2, op.BUILD: 1, op.BINPERSID: 1,
    op.STACK_GLOBAL: 2, op.REDUCE: 2, op.NEWOBJ: 2, op.STOP: 1,
}  # fmt: skip
_POPS_TO_MARK = (op.TUPLE, op.APPENDS, op.SETITEMS)
_PYTHON = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "cPickle"}  # these four are of Python 2
_CONSTANTS = {op.NONE: None, op.NEWTRUE: True, op.NEWFALSE: False, op.EMPTY_TUPLE: ()}


def expect(value: Any, *types: type) -> Any:
    """Returns ``value`` if its type is exactly one of ``types``; every value of an untrusted pickle is checked so."""
    if type(value) not in types:
        raise ValueError(f"expected {types[0].__name__}, found {type(value).__name__}")
    return value


class Interpreter:
    """Interprets the pickles at the beginning of ``data``; each call of :meth:`load` interprets one.

    Args:
        data: one or several consecutive pickles.
        allowed: the allow-list: maps the full name of a global, such as ``"numpy.dtype"``, to a constant or a function. The
            function gets the interpreter and then the pickle's arguments, all of which it must check.
        size: size of the whole file in bytes, which limits the number of instructions; ``None``: that of ``data``.
        inert: turn globals that are not in ``allowed`` into an :class:`Unknown`, unless they are in the standard library.
        bytes_of_python2: read Python 2's ``str`` as bytes instead of UTF-8 text.
        advice: text at the end of every refusal: what is supported, and what to do.

    Raises:
        Refused: the pickle contains something that is never run, or exceeds the limit of instructions.
        DAMAGE: one of these, if the pickle is invalid.
    """

    hints: ClassVar[Mapping[str, str]] = {}  # better advice for forbidden globals, by the beginning of the name

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
        """Interprets the next pickle and returns its object."""
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
        """Counts instructions and copied elements, so that a small file cannot create very many objects."""
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"has a pickle that builds too many objects for a file of {self.size:,} bytes; {self.advice}")

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.position:
            raise EOFError(
                f"expected {count:,} more bytes at the end of the file, or of its first {len(self.data):,} bytes"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    # The actions that a pickle can trigger. Arguments are untrusted: each method checks everything that it uses.

    def named(self, module: Any, name: Any) -> object:
        """Looks up a global in the allow-list."""
        full = f"{expect(module, str)[:200]}.{expect(name, str)[:200]}"
        if full not in self.allowed:
            if self.inert and self.is_inert(full):
                return Unknown(full)
            advice = next((text for begin, text in self.hints.items() if full.startswith(begin)), self.advice)
            raise Refused(f"uses the forbidden global {printable(full)}, which this reader never runs; {advice}")
        return self.allowed[full]

    def is_inert(self, full: str) -> bool:
        """Whether a global that is not in the allow-list becomes an :class:`Unknown` instead of being refused."""
        python = full.partition(".")[0] in _PYTHON
        return HARMLESS.fullmatch(full) is not None or not python

    def items_of(self, target: Any, *types: type) -> Any:
        """The list or dict that APPENDS or SETITEMS fills, also that of a :class:`Record`."""
        if type(target) is not Record:
            return expect(target, *types)
        if target.items is None:
            target.items = types[0]()
        return expect(target.items, *types)

    def persistent(self, *_: Any) -> Any:
        """A persistent id, which refers to data outside the pickle."""
        raise Refused(f"refers to data outside its pickle; {self.advice}")

    def fill(self, target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        for key, value in pairs:
            self.charge(1)
            if self.inert and type(key) in (Record, Unknown, tuple):
                continue  # such keys occur in states of optimizers, which are not needed
            # No tuples: hashing nested ones can take exponential time. No huge integers: they can be made to collide.
            if type(expect(key, str, int, float, bool, bytes, type(None))) is int and key.bit_length() > 64:
                raise ValueError("an integer of more than 64 bits as a key")
            target[key] = value
        return target

    def build(self, target: Any, state: Any) -> None:
        """The opcode BUILD, which sets attributes."""
        expect(target, Instance, Record).state = state

    def encode(self, text: Any, codec: Any) -> bytes:
        """``_codecs.encode``, which protocol 2 uses for bytes."""
        self.charge(len(expect(text, str)) // BYTES_PER_STEP)
        if expect(codec, str) != "latin1":
            raise ValueError("bytes in another encoding than latin1")
        return text.encode("latin1")
