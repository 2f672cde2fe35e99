"""From argv to a frozen request, and from an exception to an exit code: every entry point's frame.

A verb declares a frozen dataclass whose fields are its flags; `start(main, Request)` makes absl
flags of them, parses, builds the request and calls `main(request)`. Defaults and help stand once,
in the dataclass.

Exit codes: 0 done; 1 something failed along the way; 2 the request was wrong (one line on stderr).
"""

import dataclasses
import math
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args, get_origin

from absl import app, flags, logging

from transformer.errors import RequestError, nearest

T = TypeVar("T")


def flag(default: Any, help: str) -> Any:
    """A field of a request that the command line may set: `--name=value`."""
    return dataclasses.field(default=default, metadata={"help": help})


def positional(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a request that the command line gives without a name."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": True})


def overrides(prefix: str, help: str) -> Any:
    """A mapping field filled by dotted flags: `--model.n_layers=12` becomes `{"n_layers": "12"}`."""
    metadata = {"help": help, "prefix": prefix}
    return dataclasses.field(default_factory=lambda: types.MappingProxyType({}), metadata=metadata)


def start(main: Callable[[T], int | None], request: type[T]) -> None:
    """Run `main` as an absl program on the request that argv describes. Never returns."""
    parsed: list[T] = []

    def parse_argv(argv: list[str]) -> list[str]:
        try:
            parsed.append(parse(request, argv[1:], flags.FLAGS))
        except RequestError as error:
            _refuse(error)
        except SystemExit:  # --help, which absl ends with 1 after it has listed the flags
            print("\n".join(_also(request)))
            sys.exit(0)
        return argv[:1]

    def guarded(_: list[str]) -> int:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries below us tell their every move at INFO
        try:
            return main(parsed[0]) or 0
        except RequestError as error:
            _refuse(error)

    app.run(guarded, flags_parser=parse_argv)


def parse(request: type[T], argv: list[str], values: flags.FlagValues | None = None) -> T:
    """The request that `argv` (without the program) describes. Raises RequestError."""
    values = flags.FlagValues() if values is None else values
    names = _define(request, values)
    plain, dotted = _split_dotted(argv, request)
    try:
        rest = values(["program", *plain])[1:]
    except flags.UnrecognizedFlagError as error:
        raise RequestError(f"unknown flag --{error.flagname}: {nearest(error.flagname, names)}") from None
    except flags.Error as error:
        raise RequestError(str(error)) from None
    return _build(request, {n: values[n].value for n in names if values[n].present}, dotted, rest)


def _refuse(error: RequestError) -> typing.NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if "LADDER_N_PROCESSES" in os.environ:
        os._exit(2)  # sys.exit would wait in JAX's shutdown barrier for peers that never come
    sys.exit(2)


def _also(request: type) -> list[str]:
    """The end of --help: what argv may have beside plain flags."""
    said = []
    for field, _ in _fields(request):
        if "prefix" in field.metadata:
            said.append(f"  --{field.metadata['prefix']}.KEY=VALUE: {field.metadata['help']}")
        elif field.metadata.get("positional"):
            said.append(f"  {field.name.upper()}, without a flag: {field.metadata['help']}")
    return ["\nalso:", *said] if said else []


def _fields(request: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(request)
    return [(field, hints[field.name]) for field in dataclasses.fields(request)]


def _define(request: type, values: flags.FlagValues) -> list[str]:
    """Define one absl flag per field and return their names."""
    names = []
    for field, hint in _fields(request):
        if "help" not in field.metadata or "prefix" in field.metadata or field.metadata.get("positional"):
            continue
        kind, text = _bare(hint), field.metadata["help"]
        default: Any = field.default  # `flag` gives every field one
        if get_origin(kind) is Literal:
            flags.DEFINE_enum(field.name, default, list(get_args(kind)), text, flag_values=values)
        elif get_origin(kind) is tuple:
            flags.DEFINE_multi_string(field.name, ",".join(map(str, default or ())), text, flag_values=values)
        else:
            define = {
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                bool: flags.DEFINE_bool,
                str: flags.DEFINE_string,
            }
            define[kind](field.name, default, text, flag_values=values)
            values[field.name].parser = _PARSERS.get(kind, values[field.name].parser)
        values.register_key_flag_for_module(sys.argv[0], values[field.name])
        names.append(field.name)
    return names


class _Whole(flags.IntegerParser):
    def parse(self, argument: Any) -> int:
        with _saying("expected a whole number, such as 8"):
            return super().parse(argument)


class _Number(flags.FloatParser):
    def parse(self, argument: Any) -> float:
        with _saying("expected a finite number, such as 0.5 or 3e-4"):
            number = super().parse(argument)
            if not math.isfinite(number):
                raise ValueError
            return number


class _Truth(flags.BooleanParser):
    def parse(self, argument: Any) -> bool:
        with _saying("expected true or false"):
            return super().parse(argument)


_PARSERS: Mapping[type, flags.ArgumentParser] = {int: _Whole(), float: _Number(), bool: _Truth()}


@contextmanager
def _saying(expected: str) -> Iterator[None]:
    """Python's words about a number that is none are for programmers."""
    try:
        yield
    except (ValueError, TypeError):
        raise ValueError(expected) from None


def _bare(hint: Any) -> Any:
    """`int | None` -> `int`."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _split_dotted(argv: list[str], request: type) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Take `--prefix.key=value` out of argv, for the prefixes that the request has."""
    prefixes = {f.metadata["prefix"]: f.name for f, _ in _fields(request) if "prefix" in f.metadata}
    plain, dotted = [], {name: {} for name in prefixes.values()}
    for argument in argv:
        name, separator, value = argument.lstrip("-").partition("=")
        prefix, dot, key = name.partition(".")
        if not (argument.startswith("--") and dot and prefix.isidentifier()):
            plain.append(argument)
        elif prefix not in prefixes:
            raise RequestError(f"unknown flag {argument!r}: {nearest(prefix, prefixes)}")
        elif not separator or not value:
            raise RequestError(f"{argument!r} needs a value, as in --{name}=12")
        else:
            dotted[prefixes[prefix]][key] = value
    return plain, dotted


def _build(request: type[T], given: Mapping[str, Any], dotted: Mapping[str, Mapping[str, str]], rest: list[str]) -> T:
    arguments: dict[str, Any] = dict(given) | {k: types.MappingProxyType(dict(v)) for k, v in dotted.items()}
    for field, hint in _fields(request):
        if field.metadata.get("positional"):
            if rest:
                arguments[field.name] = rest.pop(0)
            elif field.default is dataclasses.MISSING:
                raise RequestError(f"missing argument: {field.metadata['help']}")
        elif get_origin(_bare(hint)) is tuple and field.name in arguments:
            arguments[field.name] = _items(field.name, ",".join(arguments[field.name]), get_args(_bare(hint))[0])
    if rest:
        raise RequestError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    return request(**arguments)


def _items(name: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise RequestError(f"--{name}={text}: expected {kind.__name__}s with commas between, such as 1,2,4,8") from None


def die_with_traceback() -> None:
    """Make an uncaught exception end this process at once.

    Without it the dying process waits up to 300 s in JAX's shutdown barrier while its peers hang
    in a collective; with it they see the loss in 0.1 s."""

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = hook
