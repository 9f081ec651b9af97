"""Secrets: used, and kept out of every file that a run writes.

A secret is the value of an environment variable whose name says so (..._KEY, _TOKEN, _SECRET, _PASSWORD), or that holds
a URL with a password or a signature. A configuration names it, `${oc.env:NAME}`, and so do the files made of it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
SHORTEST = 8  # of what is looked for in texts: less would be found everywhere
HIDDEN = "***"
OPTIONS = ("storage_options", "headers")  # mappings of a configuration whose keys are a library's own
OPTION = re.compile(r"(key|token|secret|password|passwd|credentials?|authorization|cookie)$", re.IGNORECASE)
REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
NAMED = re.compile(rf"{REFERENCE.pattern}|\$[A-Za-z_]\w*|\$\{{[A-Za-z_]\w*\}}")  # the shell's way as well, in a pipe:
IN_URL = re.compile(
    r"""(?<=://)[^/@\s'"]*:[^/@\s'"]+(?=@)"""  # user:password
    r"""|(?<=[?&;])(?:x-(?:amz|goog)-(?:signature|security-token|credential)|awsaccesskeyid|sig|signature|"""
    r"""(?:\w*_)?token|(?:\w*_)?key|password)=[^&\s'"]+""",  # what signs a request
    re.IGNORECASE,
)


def variables() -> dict[str, str]:
    """The environment's secrets by name, the longest first: one may be a part of another."""
    found = {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and (NAME.search(name) or IN_URL.search(value)) and not os.path.exists(value)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redacted(text: str) -> str:
    """As it may stand in a log. What only names a variable stays: a command that goes on with a run has such."""
    for value in variables().values():
        text = text.replace(value, HIDDEN)
    return IN_URL.sub(lambda match: match[0] if _named(match[0]) else HIDDEN, text)


def _named(part: str) -> bool:
    """Whether nothing but variables stands after the name in a part of a URL."""
    return NAMED.sub("", part)[-1:] in (":", "=")


def kept(node: Any) -> Any:
    """A configuration as it may stand in a file: each secret by the name of its variable."""
    known = variables()
    # Not inside of a word: a password that is one would be found in names of classes and folders.
    pattern = "|".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in known.values())
    names = {value: name for name, value in known.items()}

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(item) for item in node]
        if isinstance(node, str) and known:
            return re.sub(pattern, lambda match: f"${{oc.env:{names[match[0]]}}}", node)
        return node

    return walk(node)


def filled(text: str) -> str:
    """What `kept` has left out of a string put back, where this process's environment has it."""
    return REFERENCE.sub(lambda match: os.environ.get(match[1], match[0]), text)


def literal(node: Any, path: str = "", option: bool = False) -> Iterator[str]:
    """The keys of a configuration, as `kept` left it, under which a secret stands as it is.

    option: whether the keys in it are those of a library's options.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            inside = option or key in OPTIONS
            named = option and OPTION.search(str(key)) and isinstance(value, str) and not REFERENCE.search(value)
            where = f"{path}.{key}" if path else str(key)
            yield from [where] if named else literal(value, where, inside)
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from literal(item, f"{path}.{i}", option)
    elif isinstance(node, str) and IN_URL.search(NAMED.sub("", node)):
        yield path
