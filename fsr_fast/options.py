"""The grammar of all verbs: full option names, `--section.key value` for every key of the configuration, and mistakes
that end in one paragraph.

Only argparse and pydantic are imported here, so that help and mistakes do not load torch.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from pydantic import BaseModel

from fsr_fast.errors import UserError, nearest


class Given(NamedTuple):
    """The value of a key of the configuration, from the command line."""

    option: str
    """As the user wrote it."""
    value: Any
    """Text, or a list or mapping of texts."""


class Short(NamedTuple):
    """A short spelling of a key."""

    key: str
    """`section.key`."""
    help: str
    """Its meaning for this verb."""
    value: str | None = None
    """Value of the bare option; None: a value must follow."""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are `UserError` and name the closest option; options cannot be abbreviated.

    Args:
        verb: what the user calls, e.g. `train`.
        **settings: of argparse.
    """

    def __init__(self, verb: str, **settings: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"fsr-fast {verb}", allow_abbrev=False, add_help=False, formatter_class=raw, **settings)
        self.sections: dict[str, type[BaseModel]] = {}
        self.add_argument("-h", "--help", nargs="?", action=_Help, help="show this help and stop")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but look for unknown options before missing ones.

        Raises:
            UserError: an unknown option, a missing value, or one that is not among the choices.
        """
        self.arguments = list(args or ())
        if self._subparsers is None:
            for argument in self.arguments:
                if argument == "--":
                    break
                if argument.startswith("--") and argument.partition("=")[0] not in self._option_string_actions:
                    self._refuse(argument.partition("=")[0])
        return super().parse_known_args(self._join_lists(self.arguments), namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"command line: {message}; `{self.prog} --help` describes all options")

    def add_sections(
        self,
        sections: Mapping[str, type[BaseModel]],
        short: Mapping[str, Short] | None = None,
        shown: Collection[str] = (),
    ) -> None:
        """Add an option for every key of some sections; `given(namespace)` returns those that were given.

        Args:
            sections: by name.
            short: short spellings.
            shown: keys that the help describes; `--help all` describes the others.
        """
        self.sections = dict(sections)
        for spelling, (key, text, value) in (short or {}).items():
            self.add_argument(
                spelling,
                dest=key,
                action=_Key,
                kind=_kind(sections, key),
                default=argparse.SUPPRESS,
                nargs=_nargs(_kind(sections, key)) if value is None else 0,
                const=value,
                metavar=spelling.strip("-").upper() if value is None else None,
                help=text,
            )
        for section, model in sections.items():
            group = self.add_argument_group(f"--{section}.…", _first_line(model.__doc__))
            for name, field in model.model_fields.items():
                kind = field.annotation
                group.add_argument(
                    f"--{section}.{name}",
                    dest=f"{section}.{name}",
                    action=_Key,
                    kind=kind,
                    default=argparse.SUPPRESS,
                    nargs=_nargs(kind),
                    metavar=expectation(kind),
                    help=field.description,
                ).shown = f"{section}.{name}" in shown  # type: ignore[attr-defined]

    def key_actions(self) -> list[_Key]:
        """Return the options that are keys of the configuration."""
        return [action for action in self._actions if isinstance(action, _Key)]

    def defaults(self) -> Mapping[str, Any]:
        """Return the sections' values that apply where no option is given; for the help."""
        return {name: model().model_dump(mode="json") for name, model in self.sections.items()}

    def help_text(self, topic: str | None) -> str:
        """Return the help.

        Args:
            topic: `all`, a section, or None: the general options and the most common keys.

        Raises:
            UserError: an unknown topic.
        """
        if topic is not None and self.sections and topic not in ("all", *self.sections):
            raise UserError(f"--help: no section {topic!r}{nearest(topic, ['all', *self.sections])}")
        values = self.defaults() if self.sections else {}
        keys = self.key_actions()
        described = {action: action.help for action in keys}
        for action in keys:
            section, _, name = action.dest.partition(".")
            wanted = topic in ("all", section) or (topic is None and getattr(action, "shown", True))
            if not wanted:
                action.help = argparse.SUPPRESS
            elif action.option_strings[0] == f"--{action.dest}":
                default = _as_text(values[section][name])
                action.help = f"{' '.join((action.help or '').split())} [{default}]".replace("%", "%%")
        try:
            text = self.format_help()
        finally:
            for action, help_of_it in described.items():
                action.help = help_of_it
        if self.sections and topic is None:
            text += "\n" + textwrap.fill(
                f"All keys of the configuration: `{self.prog} --help all`, or --help with one of "
                f"{', '.join(self.sections)}.",
                100,
            )
        return text.rstrip() + "\n"

    def format_usage(self) -> str:
        """Return the usage, without the keys of the configuration."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._usage_actions(), self._mutually_exclusive_groups)
        return formatter.format_help()

    def format_help(self) -> str:
        """Return the help, whose usage leaves out the keys of the configuration and whose empty groups are gone."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._usage_actions(), self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
            if actions:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(actions)
                formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _join_lists(self, arguments: list[str]) -> list[str]:
        """Join an option to its list if that has commas, so that it consumes no other argument."""
        joined, rest = [], list(arguments)
        while rest:
            word = rest.pop(0)
            action = self._option_string_actions.get(word)
            if isinstance(action, _Key) and action.nargs == "+" and rest and "," in rest[0]:
                word += f"={rest.pop(0)}"
                while rest and word.endswith(","):
                    word += rest.pop(0)
            joined.append(word)
        return joined

    def _usage_actions(self) -> list[argparse.Action]:
        whole = {f"--{section}.{name}" for section, model in self.sections.items() for name in model.model_fields}
        return [action for action in self._actions if not whole & set(action.option_strings)]

    def _refuse(self, option: str) -> NoReturn:
        section, dot, name = option.removeprefix("--").partition(".")
        if section in self.sections:
            if not dot:
                raise UserError(f"command line: {option}: expected a key of this section, {option}.KEY VALUE")
            suggestion = nearest(name, self.sections[section].model_fields, f"--{section}.")
            raise UserError(f"command line: unknown option {option!r}{suggestion}")
        if dot and (near := difflib.get_close_matches(section, self.sections, n=1)):
            raise UserError(f"command line: unknown option {option!r}; did you mean {f'--{near[0]}.{name}'!r}?")
        if not dot and (close := difflib.get_close_matches(option, self._option_string_actions, n=1)):
            raise UserError(f"command line: unknown option {option!r}; did you mean {close[0]!r}?")
        some = f", those of the configuration in the sections {', '.join(self.sections)}" if self.sections else ""
        raise UserError(f"command line: unknown option {option!r}; `{self.prog} --help` describes all{some}")


def given(options: argparse.Namespace) -> dict[str, Given]:
    """Return the configuration keys given on the command line, by `section.key`."""
    return {key: value for key, value in vars(options).items() if isinstance(value, Given)}


class _Key(argparse.Action):
    """Records a key of the configuration, and how it was spelt."""

    def __init__(self, *, kind: Any, const: str | None = None, **settings: Any) -> None:
        super().__init__(const=const, **settings)
        self.kind = kind
        self.words = [word for word in expectation(kind).split("|") if word.islower()]

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        value = self.const if self.nargs == 0 else _read(values, self.kind)
        setattr(namespace, self.dest, Given(option or "", value))


class _Help(argparse.Action):
    """Prints the help; its argument is the topic."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        print(parser.help_text(values), end="")
        parser.exit()


def _kind(sections: Mapping[str, type[BaseModel]], key: str) -> Any:
    section, _, name = key.partition(".")
    return sections[section].model_fields[name].annotation


def _parts(kind: Any) -> list[Any]:
    """Return the types that a field may have."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [part for one in typing.get_args(kind) for part in _parts(one)]
    return _parts(typing.get_args(kind)[0]) if typing.get_origin(kind) is typing.Annotated else [kind]


def _origins(kind: Any) -> set[Any]:
    return {typing.get_origin(part) or part for part in _parts(kind)}


def _nargs(kind: Any) -> str | None:
    return "+" if _origins(kind) & {tuple, dict} else None


def _read(values: Any, kind: Any) -> Any:
    """Read a list with commas or spaces, or a mapping; a plain value stays text."""
    if isinstance(values, str):
        return values
    if len(values) == 1 and values[0][:1] in "[{" and values[0]:
        try:
            return yaml.safe_load(values[0])
        except yaml.YAMLError:
            return values[0]
    tokens = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if dict in _origins(kind) and all("=" in token for token in tokens):
        return {name: yaml.safe_load(value) for name, _, value in (token.partition("=") for token in tokens)}
    if tuple not in _origins(kind) or [token.lower() for token in tokens] in (["none"], ["null"]):
        return " ".join(values)
    return tokens


def expectation(kind: Any) -> str:
    """Summarise the expected values."""
    words: list[str] = []
    for part in _parts(kind):
        origin = typing.get_origin(part)
        if origin is Literal:
            words += [str(word) for word in typing.get_args(part)]
        elif origin is tuple:
            words.append("LIST")
        elif origin is dict:
            words.append("NAME=VALUE")
        elif part is bool:
            words += ["true", "false"]
        elif part is type(None):
            words.append("none")
        else:
            words.append({"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}.get(part.__name__, "VALUE"))
    return "|".join(dict.fromkeys(words))


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_as_text, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n\n")[0]
