"""Secrets: used, and kept out of every file that a run writes.

A secret is the value of an environment variable whose name says so (..._KEY, _TOKEN, _SECRET, _PASSWORD), that holds a
URL with a password or a signature, or that a configuration names. A configuration names it, `${oc.env:NAME}`, and has
its value nowhere: `build` reads it where it is used.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
SHORTEST = 8  # of what is looked for in texts: less would be found everywhere
WORDS = ("google_default",)  # that gcsfs takes as a token (anon, cloud, cache and browser are short)
HIDDEN = "***"
OPTIONS = ("storage_options", "headers", "environment")  # mappings whose keys are a library's own, or variables
OPTION = re.compile(r"(key|token|secret|password|passwd|credentials?|authorization|cookie)$", re.IGNORECASE)
PLAIN = ("_target_", "name", "folder", "checkpoint", "out", "init_from")  # keys under which there is never a secret
REFERENCE = re.compile(r"(?<!\\)\$\{oc\.env:([A-Za-z_]\w*)(?:,([^{}]*))?\}")
NAMED = re.compile(rf"{REFERENCE.pattern}|\$[A-Za-z_]\w*|\$\{{[A-Za-z_]\w*\}}|\$\([^)]*\)")  # a shell's ways as well
IN_URL = re.compile(
    r"""
    (?<=://) (?: [^/@\s'"]* : [^/@\s'"]+ | [^/@:\s'"]{20,} ) (?=@(?!sha\d+:))       # user:password@, token@
    | (?<=[?&;]) (?: x-(?:amz|goog)-(?:signature|security-token|credential) | awsaccesskeyid | sig | signature
        | (?:\w*_)?token | (?:\w*_|account|sharedaccess)?key | password ) = (?: \$\([^)]*\) | [^&;\s'"] )+
    | (?<=[\s:]) \w* (?: _key | _token | _secret | password ) = (?: \$\([^)]*\) | [^&;\s'"]{8,} )
    | authorization [:=] [ ]* (?: bearer | basic | token ) [ ]+ [^\s'"]+
    """,
    re.IGNORECASE | re.VERBOSE,
)
_named: set[str] = set()  # variables that a configuration of this process names


def variables() -> Mapping[str, str]:
    """The environment's secrets by name, the longest first: one may be a part of another."""
    return _secrets(tuple(os.environb.items()), frozenset(_named))


@lru_cache(maxsize=1)  # each write asks, and few change the environment
def _secrets(environment: tuple, named: frozenset[str]) -> Mapping[str, str]:
    found = {}
    for name, value in ((os.fsdecode(name), os.fsdecode(value)) for name, value in environment):
        if (name in named or NAME.search(name) or IN_URL.search(value)) and _long(value):
            found[name] = value
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _long(value: str) -> bool:
    """Whether it can be a secret: no path of a file with credentials, nor a word for a way to get some."""
    return len(value) >= SHORTEST and value not in WORDS and not os.path.exists(os.path.expanduser(value))


def redacted(text: str) -> str:
    """As it may stand in a log. What only names a variable stays: a command that goes on with a run has such."""
    for value in variables().values():
        text = text.replace(value, HIDDEN)
    return IN_URL.sub(lambda match: match[0] if _only_named(match[0]) else HIDDEN, text)


def _only_named(part: str) -> bool:
    """Whether nothing but variables stands after the name in a part of a URL."""
    return NAMED.sub("", part)[-1:] in ("", ":", "=", " ")


def strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All of a configuration, each with its key."""
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str):
        yield path, node


def mapped(node: Any, change: Callable[[str, str], str], path: str = "") -> Any:
    """A configuration with each string changed; change: of its key and itself."""
    if isinstance(node, Mapping):
        return {key: mapped(value, change, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [mapped(value, change, f"{path}.{i}") for i, value in enumerate(node)]
    return change(path, node) if isinstance(node, str) else node


def referring(path: str, text: str) -> str:
    """The string, its references escaped where a secret can be, or is, what they name: OmegaConf leaves them so."""
    if "${" in REFERENCE.sub("", text).replace(r"\${", ""):
        return text  # a number made of it, say
    return REFERENCE.sub(lambda m: f"\\{m[0]}" if _may_hold(path, text) or m[1] in variables() else m[0], text)


def literally(path: str, text: str) -> str:
    """The string as OmegaConf must read it to leave it as it is."""
    return text.replace("${", r"\${")


def filled(node: Any) -> Any:
    """What it names put in its place, as far as this process's environment has it."""
    return mapped(node, lambda path, text: REFERENCE.sub(_value, text))


def _value(match: re.Match) -> str:
    _named.add(match[1])
    default = match[0] if match[2] is None else match[2].strip(" '\"")
    return os.environ.get(match[1], default)


def unset(node: Any) -> Iterator[tuple[str, str]]:
    """Key and variable of each reference that this environment cannot fill."""
    for path, text in strings(filled(node)):
        yield from ((path, match[1]) for match in REFERENCE.finditer(text))


def literal(node: Any) -> Iterator[str]:
    """The keys of a configuration under which a secret stands as it is."""
    for path, text in strings(node):
        *groups, key = path.split(".")
        option = OPTION.search(key) and any(group in OPTIONS for group in groups)
        if (option and not REFERENCE.search(text) and _long(text)) or IN_URL.search(NAMED.sub("", text)):
            yield path


def written_out(node: Any, path: str) -> Iterator[str]:
    """The secret variables whose values stand where secrets can: a shell has put them there."""
    texts = [text for where, text in strings(node, path) if _may_hold(where, text)]
    for name, value in variables().items():
        if any(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) for text in texts):
            yield name


def _may_hold(path: str, text: str) -> bool:
    """Whether a secret can be in it: a library's option, a URL, a command."""
    keys = path.split(".")
    named = any(key in OPTIONS or OPTION.search(key) for key in keys)
    return keys[-1] not in PLAIN and (named or "://" in text or " " in text)
