"""Environment and command line of a run, as its files record them: without secrets and without the user's home."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")
SECRET_SUFFIXES = ("_token", "api_key", "password", "secret")  # ours: hub_token, wandb_api_key and the like
# The same within a text of JSON, such as --model_init_kwargs '{"token": "..."}', and user:password in an address.
_SECRETS_IN_TEXT = re.compile(
    r"""(["'](?:\w*_)?(?:token|api_key|password|secret)["']\s*:\s*["'])[^"']*|(?<=://)[^/@\s]+(?=@)|(?<=[?&])[^\s"']+""",
    re.I,
)


def environment(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Python, platform, package versions (None: not installed) and the commit of the source that runs.

    Package versions come from their metadata; nothing is imported. Paths under the user's home start with ~.
    """
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }
    return {name: _without_home(value) for name, value in (found | dict(extra or {})).items()}


def command_line(arguments: Iterable[str]) -> list[str]:
    """The command line without the path of the program, the user's home, and the values of secret options."""
    program, *rest = arguments
    command = [Path(program).name]
    hide_next = False
    for argument in rest:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("--") and _is_secret(option)
        if hide_next:
            command.append("***")
        elif secret and equals:
            command.append(f"{option}=***")
        else:
            command.append(_without_home(_without_secrets(argument)))
        hide_next = secret and not equals
    return command


def _is_secret(name: str) -> bool:
    name = name.lower().replace("-", "_")
    return name.endswith(SECRET_SUFFIXES) or name == "token"


def hide_secrets(name: str, value: Any) -> Any:
    """The value of a setting, with *** in place of secrets: by its name, or within its text."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(name, item) for item in value]
    if not isinstance(value, str):
        return value
    return "***" if _is_secret(name) else _without_secrets(value)


def public(text: str) -> str:
    """A text without secrets, as far as their form tells, and without the user's home."""
    return str(_without_home(_without_secrets(text)))


def _without_secrets(text: str) -> str:
    return _SECRETS_IN_TEXT.sub(lambda match: f"{match[1] or ''}***", text)


def _without_home(value: Any) -> Any:
    home = str(Path.home())
    return value.replace(home, "~") if isinstance(value, str) and len(home) > 1 else value


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source that runs, with -dirty if it was changed; None for an installed copy.

    An installed copy may lie inside the user's own repository: only a tracked source file counts.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
