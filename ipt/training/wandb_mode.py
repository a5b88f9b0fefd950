"""Whether a run may reach Weights & Biases, told without importing it.

W&B reads its settings at import, and asks on the terminal where a key is missing; both are too
early or too late for a command.
"""

import configparser
import netrc
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

ONLINE, OFFLINE, DISABLED = "online", "offline", "disabled"
MODES = {
    "online": ONLINE,
    "run": ONLINE,
    "shared": ONLINE,
    "offline": OFFLINE,
    "dryrun": OFFLINE,
    "disabled": DISABLED,
}
SECTION = "default"  # of W&B's settings files
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
DEFAULT_SERVER = "https://api.wandb.ai"


class Unreadable(Exception):
    """A file of W&B's that cannot be read; says which and why."""


class Mode(NamedTuple):
    """`mode` is ONLINE, OFFLINE or DISABLED; `reason` is told to the user where it is not what one
    would expect.
    """

    mode: str
    reason: str = ""


def wandb_mode(offline: bool | None) -> Mode:
    """The mode of a run. `offline` is `logger.offline`; where it is null, W&B's own variables and
    files decide.

    WANDB_MODE and WANDB_DISABLED come first, then what `wandb offline` has written, and without a
    key a run is offline. So it is where one of these cannot be read: nothing is sent by mistake.
    """
    if offline is not None:
        return Mode(OFFLINE if offline else ONLINE)
    try:
        if _is_true(os.environ.get("WANDB_DISABLED", "")):
            return Mode(DISABLED, "nothing is logged, as WANDB_DISABLED says")
        settings = _settings()
        wanted = os.environ.get("WANDB_MODE") or settings.get("mode") or ONLINE
        if _is_true(settings.get("disabled", "")):  # of older versions of `wandb offline`
            wanted = OFFLINE
        if wanted.lower() not in MODES:
            return Mode(OFFLINE, f"offline, as WANDB_MODE={wanted} is none of {', '.join(MODES)}")
        mode = MODES[wanted.lower()]
        if mode == DISABLED:
            return Mode(DISABLED, "nothing is logged, as WANDB_MODE says")
        return Mode(OFFLINE) if mode == ONLINE and not find_key() else Mode(mode)
    except Unreadable as error:
        return Mode(OFFLINE, f"offline, as {error}")


def has_key() -> bool:
    """Whether a key is configured that can be read."""
    try:
        return find_key()
    except Unreadable:
        return False


def find_key() -> bool:
    """Whether a key is configured. Raises Unreadable for a .netrc that cannot be read."""
    if any(os.environ.get(name, "").strip() for name in KEYS):
        return True
    server = urlsplit(
        os.environ.get("WANDB_BASE_URL") or _settings().get("base_url") or DEFAULT_SERVER
    )
    path = _netrc_path()
    try:
        found = netrc.netrc(path)
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} cannot be read ({_reason(error)})") from None
    entry = found.authenticators(server.netloc) or found.authenticators(server.hostname or "")
    return bool(entry and entry[2])


def _settings() -> dict[str, str]:
    """W&B's settings: those of the user, and over them those of the current folder."""
    config = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    places = [Path(_expanded(config)), Path(os.environ.get("WANDB_DIR") or ".") / "wandb"]
    settings: dict[str, str] = {}
    for path in (place / "settings" for place in places):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise Unreadable(f"{path} cannot be read ({_reason(error)})") from None
        if parser.has_section(SECTION):
            settings |= dict(parser[SECTION])
    return settings


def _netrc_path() -> str:
    """The file that W&B would read."""
    if given := os.environ.get("NETRC"):
        return _expanded(given)
    names = [_expanded(f"~/{name}") for name in (".netrc", "_netrc")]
    return next((name for name in names if os.path.lexists(name)), names[0])


def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - which leaves ~ where there is no home folder


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200]
