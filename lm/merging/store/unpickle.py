"""Reading the pickles of PyTorch checkpoints without running anything they ask for.

A pickle is a program: a list of instructions, some of which call any function of any module by
name. Python's unpickler executes it; this one looks at the instructions (`pickletools.genops` only
decodes) and follows those that build dictionaries, lists, tuples, numbers and text. A function is
a name and no more: the few that rebuild tensors are known here and make a `TensorPlace`, a plain
description. Whatever else is called ends in an error.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["STORAGES", "TensorPlace", "UnsafePickle", "load"]

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e5m2Storage": "float8_e5m2",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""PyTorch's storage classes and their numbers by NumPy's names."""
_DTYPES = {
    "float64": "float64",
    "double": "float64",
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "int64": "int64",
    "int32": "int32",
    "int16": "int16",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}


class UnsafePickle(Exception):
    """The pickle does what no checkpoint of tensors needs to do, or is damaged."""


class _Storage(NamedTuple):
    key: str
    dtype: str | None
    """None for untyped bytes."""


class TensorPlace(NamedTuple):
    """A tensor: elements of a storage."""

    key: str
    """Name of the storage in the archive."""
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """First element."""


class _Global(NamedTuple):
    module: str
    name: str


_MARK = object()


def load(data: bytes) -> Any:
    """The content of a pickle: dicts, lists, tuples, sets, numbers, text and `TensorPlace`s.

    Raises:
      UnsafePickle: it names something that is not on the list, or is no proper pickle.
    """
    import pickletools

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in texts that only damage makes
            return _Machine().run(pickletools.genops(data))
    except UnsafePickle:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        raise UnsafePickle(f"is damaged ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, instructions: Any) -> Any:
        for opcode, argument, _ in instructions:
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise UnsafePickle(f"uses the instruction {name}, which no weights need")
        raise UnsafePickle("is damaged: it has no end")

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise UnsafePickle("is damaged: a mark is missing")

    def put(self, argument: int | None) -> None:
        self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[int(argument)])

    def tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnsafePickle("sets items of something that is no dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | set):
            raise UnsafePickle("appends to something that is no list")
        target.extend(items) if isinstance(target, list) else target.update(items)

    def find(self, argument: str | None) -> None:
        if argument is None:
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, _, name = argument.partition(" ")
        self.stack.append(_Global(str(module), str(name)))

    def persistent(self) -> None:
        kind, storage, key, *_ = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global):
            raise UnsafePickle("refers to something outside that is no tensor storage")
        if storage.name == "UntypedStorage" and storage.module.startswith("torch"):
            self.stack.append(_Storage(str(key), None))
        elif storage.name in STORAGES and storage.module in ("torch", "torch.cuda"):
            self.stack.append(_Storage(str(key), STORAGES[storage.name]))
        else:
            raise UnsafePickle(f"has a storage of unknown kind {'.'.join(storage)}")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickle("calls something that is no function")
        if function not in _FUNCTIONS:
            raise UnsafePickle(
                f"wants to run {'.'.join(function)}, which no weights need; nothing was run"
            )
        self.stack.append(_FUNCTIONS[function](*arguments))

    def build(self) -> None:
        state = self.stack.pop()
        # Ordered dictionaries of PyTorch carry `_metadata`; tensors' attributes change no values.
        if not isinstance(self.stack[-1], dict | TensorPlace) or not isinstance(state, dict):
            raise UnsafePickle("sets the state of an object, which no weights need")


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> TensorPlace:
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise UnsafePickle("builds a tensor of something that is no storage")
    return _place(storage.key, storage.dtype, shape, strides, offset)


def _rebuild_untyped(
    storage: Any, offset: int, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, *_
) -> TensorPlace:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Global):
        raise UnsafePickle("builds a tensor of something that is no storage")
    if dtype.module != "torch" or dtype.name not in _DTYPES:
        raise UnsafePickle(f"has a tensor of the unsupported dtype {'.'.join(dtype)}")
    return _place(storage.key, _DTYPES[dtype.name], shape, strides, offset)


def _place(key: str, dtype: str, shape: Any, strides: Any, offset: Any) -> TensorPlace:
    shape, strides = tuple(shape), tuple(strides)
    good = len(shape) == len(strides) and all(
        type(n) is int and 0 <= n < 1 << 62 for n in (*shape, *strides, offset)
    )
    if not good or math.prod(shape) >= 1 << 62:
        raise UnsafePickle("has a tensor of an impossible shape")
    return TensorPlace(key, dtype, shape, strides, offset)


def _parameter(value: Any, *_: Any) -> TensorPlace:
    if not isinstance(value, TensorPlace):
        raise UnsafePickle("makes a parameter of something that is no tensor")
    return value


_FUNCTIONS: dict[_Global, Callable[..., Any]] = {
    _Global("torch._utils", "_rebuild_tensor"): _rebuild,
    _Global("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    _Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    _Global("torch._utils", "_rebuild_parameter"): _parameter,
    _Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    _Global("torch._tensor", "_rebuild_from_type_v2"): lambda f, _, x, *__: _FUNCTIONS[f](*x),
    _Global("collections", "OrderedDict"): lambda items=(): dict(items),
    _Global("torch", "Size"): lambda items=(): tuple(items),
    _Global("torch", "device"): lambda *names: str(names),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda self, _: self.stack.append(tuple(self.pop_to_mark())),
    "TUPLE1": lambda self, _: self.tuple(1),
    "TUPLE2": lambda self, _: self.tuple(2),
    "TUPLE3": lambda self, _: self.tuple(3),
    "LIST": lambda self, _: self.stack.append(self.pop_to_mark()),
    "SETITEM": lambda self, _: self.set_items([*reversed((self.stack.pop(), self.stack.pop()))]),
    "SETITEMS": lambda self, _: self.set_items(self.pop_to_mark()),
    "APPEND": lambda self, _: self.append([self.stack.pop()]),
    "APPENDS": lambda self, _: self.append(self.pop_to_mark()),
    "ADDITEMS": lambda self, _: self.append(self.pop_to_mark()),
    "POP": lambda self, _: self.stack.pop(),
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": lambda self, _: self.find(None),
    "BINPERSID": lambda self, _: self.persistent(),
    "REDUCE": lambda self, _: self.call(),
    "BUILD": lambda self, _: self.build(),
}
