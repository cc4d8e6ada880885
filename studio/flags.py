"""Command-line flags made from a specification's fields, and a TOML file below them.

Values stay text until the specification validates them, so TOML, flags and the page judge a value in one
place and in the same words, and all problems are found at once.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from studio.errors import SpecError, UsageError
from studio.registry import nearest
from studio.specs import MethodSpec, allows_none, settable
from studio.specs.base import (
    Flag,
    alternatives,
    is_mapping,
    is_sequence,
    of_other_methods,
    problems_of,
    still_meant,
)
from studio.specs.groups import grouped

S = TypeVar("S", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """A parser that takes ``--a_b`` for ``--a-b``, guesses no abbreviations and raises instead of exiting."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after spelling known flags the way they are declared."""
        return super().parse_known_args([self._spelled(item) for item in args or ()], namespace)

    def _spelled(self, item: str) -> str:
        name, equals, value = item.partition("=")
        hyphened = name.replace("_", "-")
        return hyphened + equals + value if hyphened in self._option_string_actions else item

    def flag_names(self) -> list[str]:
        """Return the long flags that the parser knows."""
        return [name for name in self._option_string_actions if name.startswith("--")]


def read_spec_arguments(
    parser: Parser, spec_type: type[S], argv: Sequence[str], *, given: Mapping[str, Any] | None = None
) -> tuple[S, argparse.Namespace]:
    """Return the specification of ``defaults < given < TOML < flags`` and the parser's own arguments.

    Args:
        parser: Holds the command's own flags; those of the specification are added to it.
        spec_type: What the flags describe.
        argv: The words after the command.
        given: Values below all others, such as those of a picture or a preset.

    Raises:
        SpecError: Lists every problem: unreadable TOML keys, unknown flags, bad values.
        UsageError: A flag lacks its value, or the TOML file cannot be read.
    """
    config, method = _early(argv)
    above = _flat(read_toml(config) if config else {})
    below = _flat(given or {})
    if issubclass(spec_type, MethodSpec):
        method = method or str((below | above).get("method") or spec_type.model_fields["method"].default)
    add_fields(parser, spec_type, method)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with any of these options; flags win."
    )
    arguments, rest = parser.parse_known_args(argv)
    fields = settable(spec_type, method)
    flags = {
        name: _pairs(value) if is_mapping(fields[name]) and not _own_flag(fields[name]) else value
        for name, value in vars(arguments).items()
        if name in fields
    }
    problems = _unknown(parser, rest, spec_type)
    later = {name: _at_home(value, fields.get(name)) for name, value in {**above, **flags}.items()}
    merged = {**still_meant(spec_type, below, later), **later}
    try:
        spec = spec_type.model_validate(merged)
    except ValidationError as error:
        raise SpecError(problems + problems_of(error, spec_type, merged)) from None
    if problems:
        raise SpecError(problems)
    return spec, arguments


def add_fields(parser: argparse.ArgumentParser, spec_type: type[BaseModel], method: str | None) -> None:
    """Add one flag per field of the specification, and of the method's options after the first group."""
    first, *others = grouped(spec_type).items()
    fields = settable(spec_type, method)
    groups = [first]
    if issubclass(spec_type, MethodSpec) and method in spec_type.registry.names():
        own = [name for name in fields if name not in spec_type.model_fields]
        groups.append((f"options of the {spec_type.registry.noun} '{method}'", own))
    for heading, names in (*groups, *others):
        group = parser.add_argument_group(heading)
        for name in names:
            _add_field(group, name, fields[name])


def read_toml(path: Path, what: str = "config file") -> dict[str, Any]:
    """Return the keys of a TOML file; ``what`` is what messages call it.

    Raises:
        UsageError: If it cannot be read; names the line where it is malformed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read the {what} '{path}': {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the {what} '{path}' is not valid TOML: {error}.") from None


def _early(argv: Sequence[str]) -> tuple[Path | None, str | None]:
    """Find the config file and the method, on which the set of flags depends."""
    parser = Parser(add_help=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--method")
    arguments, _ = parser.parse_known_args(argv)
    return arguments.config, arguments.method


def _at_home(value: Any, field: FieldInfo | None) -> Any:
    """Return a path that begins with ``~`` as one in the user's home, as shells do; TOML has no shell."""
    if field is None or not isinstance(value, str) or not value.startswith("~"):
        return value
    return str(Path(value).expanduser()) if Path in alternatives(field.annotation) else value


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document's keys with underscores, those of its ``[options]`` table among them."""
    values = {key.replace("-", "_"): value for key, value in document.items()}
    options = values.get("options")
    if isinstance(options, Mapping):
        del values["options"]
        values |= {key.replace("-", "_"): value for key, value in options.items()}
    return values


def _add_field(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    flags = ["--" + name.replace("_", "-")]
    kinds = [kind for kind in alternatives(field.annotation) if kind is not type(None)]
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
    if own := _own_flag(field):
        group.add_argument(f"--{own.name}", action="append", metavar=own.metavar, **settings)
        return
    if kinds == [bool]:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
        return
    if is_sequence(field):
        if name.endswith("s"):
            flags.insert(0, flags[0][:-1])
        settings |= {"action": "append"}
    elif is_mapping(field):
        settings |= {"action": "append", "metavar": "KEY=VALUE"}
    settings.setdefault("metavar", _metavar(kinds))
    group.add_argument(*flags, **settings)


def _own_flag(field: FieldInfo) -> Flag | None:
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), None)


def _pairs(items: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        parts = item.split(",")
        # A comma belongs to a value or a file's name unless a pair follows it, too.
        for pair in parts if all("=" in part for part in parts) else [item]:
            key, equals, value = pair.strip().rpartition("=")
            if not equals:
                raise UsageError(f"'{item}' must be KEY=VALUE.")
            pairs[key] = value
    return pairs


def _metavar(kinds: Sequence[Any]) -> str:
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return "{" + ",".join(words) + "}"
    kind = kinds[0] if kinds else str
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        text += " Required."
    elif isinstance(field.default, bool):
        text += f" [{'on' if field.default else 'off'}]"
    elif (default := field.get_default(call_default_factory=True)) not in (None, "", (), {}):
        text += f" [{default}]"
    if allows_none(field) and field.default is not None:
        text += " ('none' for none)"
    return text.replace("%", "%%")


def _unknown(parser: Parser, rest: Sequence[str], spec_type: type[BaseModel]) -> list[str]:
    known = parser.flag_names()
    problems = []
    for item in rest:
        name = item.partition("=")[0]
        if name.startswith("-") and len(name) > 1 and not name[1].isdigit():
            elsewhere = of_other_methods(spec_type, name.lstrip("-").replace("-", "_"))
            close = nearest(name.replace("_", "-"), known)
            problems.append(f"{name}: {elsewhere or f'unknown option.{close}'}")
    return problems or [f"{item}: unexpected argument." for item in rest]
