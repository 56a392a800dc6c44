"""Turn what the user said, in words or in a spec file, into a pipeline."""

import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypeVar

import attrs
import msgspec

from schemas.prepare import Request
from stages.errors import UsageError
from stages.pipeline import Pipeline

_CHOICES = frozenset({"on_failure", "conflicts", "sync"})  # may be chosen anew when a run goes on
_OF_THE_RUN = frozenset({"run", "discard"})
_WORDS = frozenset({"roots", "cmd", "spec", "network", "timeout"}) | _CHOICES | _OF_THE_RUN

_Number = TypeVar("_Number", int, float)

Options = Mapping[str, str | list[str]]
"""Options by name, as the user wrote them; argv and roots may be lists."""


@attrs.frozen(kw_only=True)
class Spec:
    """A spec file; everything may be left out. cmd is a shell command, argv a list of arguments: one of the two."""

    argv: list[str] | None = None
    cmd: str | None = None
    roots: list[str] | None = None
    network: bool | None = None
    timeout: float | None = None
    on_failure: str | None = None
    conflicts: str | None = None
    sync: bool | None = None


def pipeline(options: Options, folder: str) -> Pipeline:
    """Return the pipeline of the run that the options begin, or go on with if they name no command.

    folder: where the user stood; relative paths count from it.

    Raises UsageError.
    """
    check_words(options, _WORDS)
    values = _values(options, folder)
    discard = values.pop("discard", False)
    run = values.pop("run", None)
    if "argv" in values:
        if run or discard:
            raise UsageError("a command begins a new run; run and discard are for going on with one", "leave one out")
        return Pipeline(make(values, folder))
    if values.keys() - _CHOICES:
        raise UsageError("no command given", "say cmd='SHELL COMMAND', or put argv into the spec file")
    request = make({"argv": [], **values}, folder)
    return Pipeline(run=run, discard=discard, choices={name: getattr(request, name) for name in values})


def check_words(options: Options, known: AbstractSet[str]) -> None:
    """Raise UsageError for an option that is not among the known ones."""
    for name in options:
        if name not in known and not (name == "argv" and known is _WORDS):
            raise UsageError(
                f"there is no option {name!r} here", f"the options are: {', '.join(sorted(known)) or 'none'}"
            )


def number(options: Mapping[str, str], name: str, kind: type[_Number]) -> _Number | None:
    """Return an option that is a number of at least 0, None if it was not given. Raises UsageError."""
    if name not in options:
        return None
    try:
        value = kind(options[name])
    except ValueError as error:
        raise UsageError(f"{name}={options[name]}: give a number") from error
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name}={options[name]}: give a number of at least 0")
    return value


def _values(options: Options, folder: str) -> dict[str, Any]:
    """Return the values of spec file and options by field of the request."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name == "spec":
            spec = attrs.asdict(_read_spec(os.path.join(folder, str(value))))
            values = {key: chosen for key, chosen in spec.items() if chosen is not None} | values
        elif name in ("network", "sync", "discard"):
            if value not in ("yes", "no"):
                raise UsageError(f"{name}={value}: say {name}=yes or {name}=no")
            values[name] = value == "yes"
        elif name == "roots" and isinstance(value, str):
            values[name] = [root for root in value.split(os.pathsep) if root]
        else:
            values[name] = value
    cmd = values.pop("cmd", None)
    if cmd is not None:
        if "argv" in values:
            raise UsageError("a command is given twice, as cmd and as argv", "leave one of them out")
        values["argv"] = ["sh", "-c", cmd] if cmd.strip() else []
    return values


def make(values: Mapping[str, Any], folder: str) -> Request:
    """Return a checked request of values by field name; roots that are relative count from the folder.

    Raises UsageError for a value of a wrong type or outside of what the field takes.
    """
    roots = [os.path.realpath(os.path.join(folder, root)) for root in values.get("roots", ["."])]
    try:
        # Words such as timeout=1.5 are text still: strict=False takes them for numbers.
        request = msgspec.convert({**values, "roots": roots}, Request, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"the request is wrong: {error}") from error
    if request.timeout is not None and not 0 < request.timeout < float("inf"):
        raise UsageError(f"timeout={request.timeout:g}: give a number of seconds above 0")
    if any("\0" in word for word in [*request.argv, *request.roots]):
        raise UsageError("the command or a root holds a NUL character, which no argument and no path can")
    return request


def _read_spec(path: str) -> Spec:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"spec file {path}: {error.strerror}") from error
    try:
        if path.endswith(".toml"):
            import tomllib

            values = tomllib.loads(content.decode())
        else:
            values = msgspec.json.decode(content)
        spec = msgspec.convert(values, Spec)
    except (ValueError, msgspec.MsgspecError) as error:
        raise UsageError(f"spec file {path}: {error}") from error
    unknown = values.keys() - {field.name for field in attrs.fields(Spec)}
    if unknown:
        raise UsageError(f"spec file {path}: there is no option {', '.join(sorted(unknown))}")
    return spec
