"""A routing policy of the user's own: its module is found, imported, and its class made.

In: `module:Class` and directories to look in. Out: a policy; or a ValueError that names the policy and what
is wrong with it, with file and line. Whatever that code does when it is imported and made is told in words.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from headrace.cluster.options import RoutingOptions
from headrace.cluster.routing.policy import Policy
from headrace.world import Chance

LONGEST = 500
"""Characters of what an error says."""


class PolicyNotFoundError(ValueError):
    """There is no such module here; on another machine there may be one."""


def load_policy(options: RoutingOptions, chance: Chance) -> Policy:
    """The policy that `options` name as module:Class."""
    name = options.policy
    module_name, _, attribute = name.partition(":")
    try:
        with _found_also_in(options.policy_directories):
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and _is_of(error.name, module_name):
            where = ", ".join(_absolute(options.policy_directories))
            raise PolicyNotFoundError(
                f"the routing policy {name!r} cannot be imported: there is no module {error.name!r} on "
                f"Python's path, nor in {where}; put its file there, or set PYTHONPATH"
            ) from error
        raise ValueError(
            f"the routing policy {name!r} cannot be imported: {in_words(error)}{_at(error)}"
        ) from error
    found = getattr(module, attribute, None)
    file = getattr(module, "__file__", None) or module_name
    if found is None:
        raise ValueError(f"the routing policy {name!r} cannot be imported: {file} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(
            f"{name!r} is no routing policy ({_place(found, file)}); derive it from "
            "headrace.cluster.routing.Policy"
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(
            f"the routing policy {name!r} lacks {', '.join(missing)} ({_place(found, file)}); write "
            "terms(self, among)"
        )
    try:
        made = found(options, chance)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = _at(error) or f" ({_place(found, file)})"
        raise ValueError(
            f"the routing policy {name!r} cannot be made of (options, chance): {in_words(error)}{where}"
        ) from error
    if not isinstance(made, Policy):
        raise ValueError(
            f"the routing policy {name!r} makes a {type(made).__name__} and no policy ({_place(found, file)})"
        )
    return made


def in_words(error: BaseException) -> str:
    """What an error says, in one line that can be printed, whatever it is made of."""
    said = " ".join("".join(traceback.format_exception_only(error)[-1:]).split())
    return said[:LONGEST].encode(errors="backslashreplace").decode()


@contextmanager
def _found_also_in(directories: Sequence[str]) -> Iterator[None]:
    """Look for modules in these directories too: last, so that none of their files takes the place of what is
    installed, and only now, so that nothing else is ever imported from there."""
    before, added = list(sys.path), _absolute(directories)
    sys.path.extend(added)
    importlib.invalidate_caches()  # a file that was just written is there
    try:
        yield
    finally:
        for each in added:
            if sys.path.count(each) > before.count(each):
                _remove_last(sys.path, each)


def _remove_last(paths: list[str], path: str) -> None:
    del paths[len(paths) - 1 - paths[::-1].index(path)]


def _absolute(directories: Sequence[str]) -> list[str]:
    """Each once, in this order."""
    return list(dict.fromkeys(os.path.abspath(each) for each in directories))


def _is_of(missing: str | None, module: str) -> bool:
    """Whether what is missing is the module itself, or a package that it is in."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _at(error: BaseException) -> str:
    """Where in the user's code an error comes from; empty: it does not get there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen")
    ]
    if not frames:
        return ""
    # What it calls elsewhere is not what its author can mend.
    home = os.path.dirname(frames[0].filename)
    last = [frame for frame in frames if os.path.dirname(frame.filename) == home][-1]
    return f" ({last.filename}, line {last.lineno})"


def _place(found: object, file: str) -> str:
    """File and line of a class, as far as there are any."""
    try:
        return f"{inspect.getsourcefile(found)}, line {inspect.getsourcelines(found)[1]}"  # type: ignore[arg-type]
    except (TypeError, OSError):
        return file
