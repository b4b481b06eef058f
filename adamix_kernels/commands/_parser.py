"""The commands' parser: HfArgumentParser over dataclasses, files of options, and errors in this package's words."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from ._words import closest, read_options

FILES = (".json", ".yaml", ".yml")
_TRUTHS = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}
_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """parts: one instance per dataclass. words: what is no option, in order. given: names of the options set by the
    user, in a file or on the command line."""

    parts: tuple[Any, ...]
    words: list[str]
    given: frozenset[str]


class OptionParser(HfArgumentParser):
    """Flags in both spellings (--max_tokens, --max-tokens), or a JSON or YAML file of them; flags override the file.

    Args:
        command: its name after `adamix`, for the usage line and the errors.
        types: dataclasses; `_argument_group_name` of one titles its options in the help.
        words: how the usage line shows the words that are no options; "" allows none.
        lone_file: whether one file as the only argument is a file of options, not a word.
        hidden: options under the title `hidden_title`, which --help leaves to --help_all, but for `shown`, by name the
            line that --help has for it.
        defaults: where they differ from the dataclasses' own.
    """

    def __init__(
        self,
        command: str,
        types: Sequence[Any],
        description: str,
        *,
        words: str = "",
        lone_file: bool = True,
        hidden: Collection[str] = (),
        hidden_title: str = "",
        shown: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self._command, self._takes_words, self._lone_file = f"adamix {command}", bool(words), lone_file
        super().__init__(
            list(types),
            prog=self._command,
            usage=" ".join(filter(None, [self._command, words, "[options]"])),
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        for alias, name in (aliases or {}).items():
            self.add_argument(f"--{alias}", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for action in self._actions:
            if action.type is string_to_bool:  # a switch also where TrainingArguments has None for a default
                action.nargs, action.const = "?", True
        self.set_defaults(**(defaults or {}))
        self._hide(hidden, hidden_title, shown or {})
        self.add_argument("--config", metavar="FILE", help="JSON or YAML file of these options; flags override it")
        self.add_argument("-h", "--help", action="help", help="show this help")
        everything = "show every option, those of transformers' Trainer too" if hidden else argparse.SUPPRESS
        self.add_argument("--help_all", "--help-all", action=_HelpAll, nargs=0, help=everything)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Raises ValueError, in one sentence, for an option, a value or a file that is not understood."""
        flags, words = list(argv), []
        if "--" in flags:
            words = flags[flags.index("--") + 1 :]
            flags = flags[: flags.index("--")]
        path, flags = self._config_file(flags)
        from_file, raw, more = self._of_file(path) if path else ([], {}, [])
        self.set_defaults(**raw)
        flags = [*from_file, *self._explicit(flags)]
        namespace, rest = self.parse_known_args(flags)
        self._check_unknown(rest)
        words = [*more, *rest, *words]
        if words and not self._takes_words:
            raise ValueError(f"got {words[0]!r}, expected options alone; {self._command} --help shows them")
        given = {action.dest for f in flags if (action := self._option_string_actions.get(f.partition("=")[0]))}
        parts = []
        for kind in self.dataclass_types:
            values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init}
            parts.append(kind(**values))
        return Parsed(tuple(parts), words, frozenset(given | set(raw)))

    def error(self, message: str) -> NoReturn:
        raise ValueError(_reworded(message))

    def _names(self) -> dict[str, argparse.Action]:
        """Every option by its name as a key of a file."""
        options = self._option_string_actions.items()
        return {name.lstrip("-").replace("-", "_"): action for name, action in options if name.startswith("--")}

    def _hide(self, names: Collection[str], title: str, shown: Mapping[str, str]) -> None:
        self._hidden: dict[argparse.Action, str | None] = {}
        if not names:
            return
        group = self.add_argument_group(title)
        order = list(shown)
        actions = [a for a in self._actions if a.dest in names]
        for action in sorted(actions, key=lambda a: order.index(a.dest) if a.dest in shown else len(order)):
            # argparse has no way to move one: where it stands decides its heading, and nothing else.
            if action in self._optionals._group_actions:
                self._optionals._group_actions.remove(action)
                group._group_actions.append(action)
            first = f"--{action.dest}" in action.option_strings  # not its --no_ form, nor an alias
            self._hidden[action] = action.help
            action.help = shown[action.dest] if action.dest in shown and first else argparse.SUPPRESS

    def show_all(self) -> None:
        for action, text in self._hidden.items():
            action.help = text

    def _config_file(self, flags: list[str]) -> tuple[str | None, list[str]]:
        """(file, the flags besides it): of --config, or where it is the only argument."""
        if self._lone_file and len(flags) == 1 and flags[0].endswith(FILES) and not flags[0].startswith("-"):
            return flags[0], []
        path, rest, i = None, [], 0
        while i < len(flags):
            name, equals, value = flags[i].partition("=")
            if name == "--config":
                if not equals:
                    i += 1
                    if i == len(flags):
                        raise ValueError("--config: got nothing after it, expected a JSON or YAML file")
                    value = flags[i]
                path = value
            else:
                rest.append(flags[i])
            i += 1
        return path, rest

    def _of_file(self, path: str) -> tuple[list[str], dict[str, Any], list[str]]:
        """(flags, values that no flag can carry, words) of a file."""
        names, flags, raw, words = self._names(), [], {}, []
        for key, value in read_options(path).items():
            name = str(key).lstrip("-").replace("-", "_")
            if name == "words" and self._takes_words:
                words = [str(v) for v in (value if isinstance(value, list) else [value])]
                continue
            if name not in names or name in ("config", "help", "help_all"):
                hint = closest(name, [n for n in names if n not in ("config", "help", "help_all")])
                raise ValueError(f"{path}: got the key {key!r}, expected an option of {self._command}{hint}")
            action, flag = names[name], f"--{name}"
            if value is None:
                continue
            if action.nargs == "?" and isinstance(value, bool) and action.type is not string_to_bool:
                flags += [flag] if value else []  # --resume: alone, or with a value
            elif isinstance(action, argparse._StoreFalseAction):
                flags += [flag] if value else []
            elif isinstance(value, list) and action.nargs in ("+", "*"):
                flags += [flag, *map(_text, value)] if value else []
            elif isinstance(value, (list, dict)):
                raw[action.dest] = value
            elif action.nargs in ("+", "*"):
                flags += [flag, _text(value)]
            else:
                flags.append(f"{flag}={_text(value)}")
        return flags, raw, words

    def _explicit(self, flags: list[str]) -> list[str]:
        """--json becomes --json=true where what follows is no truth value: it may be a word of the command."""
        made = []
        for i, flag in enumerate(flags):
            action = self._option_string_actions.get(flag)
            alone = action is not None and action.nargs == "?" and action.type is string_to_bool
            if alone and not (i + 1 < len(flags) and flags[i + 1].lower() in _TRUTHS):
                flag = f"{flag}=true"
            made.append(flag)
        return made

    def _check_unknown(self, rest: Iterable[str]) -> None:
        for flag in rest:
            if flag.startswith("-") and flag != "-":
                name = flag.partition("=")[0]
                hint = closest(name.lstrip("-").replace("-", "_"), self._names(), "--")
                more = "--help_all" if self._hidden else "--help"
                raise ValueError(f"{name}: got an unknown option, expected one of {self._command} {more}{hint}")


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.show_all()
        parser.print_help()
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """One spelling, a short word for the value, and the default where there is one to tell."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 118))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = action.option_strings
        name = ", ".join(names[:2]) if names and names[0] == "-h" else names[0] if names else action.dest
        if action.nargs == 0 or action.type is string_to_bool:
            return name
        if isinstance(action.metavar, tuple):
            return f"{name} {' '.join(action.metavar)}"
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        return f"{name} {action.metavar or choices or _placeholder(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, "", False, 0, argparse.SUPPRESS) or default == [] or "(default: " in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})"


def _placeholder(action: argparse.Action) -> str:
    word = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{word} ..." if action.nargs in ("+", "*") else str(word)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _reworded(message: str) -> str:
    """argparse's errors as `--flag: got X, expected Y`."""
    if message.startswith("the following arguments are required: "):
        return f"{message.partition(': ')[2].split(',')[0].split('/')[0]}: got nothing, expected a value"
    found = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
    if not found:
        return message
    flag, rest = found[1].split("/")[0], found[2]
    if kind := re.fullmatch(r"invalid (\w+) value: (.*)", rest, re.DOTALL):
        return f"{flag}: got {kind[2]}, expected {_KINDS.get(kind[1], kind[1])}"
    if choice := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", rest, re.DOTALL):
        return f"{flag}: got {choice[1]}, expected one of {choice[2]}"
    if rest.startswith("Truthy value expected"):
        return f"{flag}: got {rest.partition('got ')[2].partition(' but')[0]!r}, expected true or false"
    if rest.startswith("expected "):
        return f"{flag}: got nothing after it, {rest.replace('argument', 'value')}"
    return f"{flag}: {rest}"


def names(option: str, values: Sequence[str]) -> list[str] | str | None:
    """A list of names out of `a b`, `a,b` or `a, b`; a single regular expression, or "all-linear", as it is.

    Raises ValueError for a regular expression among several values.
    """
    if not values:
        return None
    if len(values) == 1 and (values[0].lower() == "all-linear" or _is_expression(values[0])):
        return values[0]
    found = [name for value in values for name in re.split(r"[,\s]+", value) if name]
    wrong = [name for name in found if _is_expression(name)]
    if wrong:
        raise ValueError(f"{option}: got the expression {wrong[0]!r} among several values, expected it alone, or names")
    return found or None


def numbers(option: str, values: Sequence[str]) -> list[int] | None:
    """Whole numbers out of `0 1`, `0,1`. Raises ValueError for another word."""
    found = [word for value in values for word in re.split(r"[,\s]+", value) if word]
    wrong = [word for word in found if not word.isdecimal()]
    if wrong:
        raise ValueError(f"{option}: got {wrong[0]!r}, expected whole numbers")
    return [int(word) for word in found] or None


def _is_expression(value: str) -> bool:
    return re.search(r"[\\*+?()\[\]{}|^$]", value) is not None
