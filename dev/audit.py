"""Check the pinned packages for known vulnerabilities: `python -m dev.audit PIP_AUDIT`.

`make audit` and CI run it. Every line of requirements/cpu.txt and gpu.txt must pin an exact
version, so that the audited versions are the installed ones. pip-audit compares them with the
advisories of the Python Packaging Authority. If these cannot be reached, the audit prints a warning
and exits with 0. Exit code 1: a line does not pin a version, or a package has a known
vulnerability.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

REQUIREMENTS = sorted((Path(__file__).resolve().parents[1] / "requirements").glob("?pu.txt"))
PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+")
PROBE = (
    "jinja2==3.1.2"  # has known vulnerabilities: without any result the advisories are unreachable
)


def main(pip_audit: str) -> int:
    wrong = [
        f"{path.name}: {line}"
        for path in REQUIREMENTS
        for line in _lines(path)
        if not PIN.fullmatch(line)
    ]
    if wrong:
        print(f"error: not pinned to an exact version: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    if not look_up(pip_audit, [PROBE])[0]:
        rule = "=" * 100
        reason = "the advisories cannot be reached. Run `make audit` on another network."
        print(f"{rule}\nAUDIT NOT DONE: {reason}\n{rule}")
        return 0
    vulnerable, unknown = look_up(
        pip_audit, sorted({line for path in REQUIREMENTS for line in _lines(path)})
    )
    for line in vulnerable:
        print(f"error: {line}", file=sys.stderr)
    print(
        f"audit: {len(vulnerable)} packages with known vulnerabilities; {len(unknown)} packages "
        f"without data: {', '.join(unknown) or 'none'}"
    )
    return bool(vulnerable)


def look_up(pip_audit: str, pins: list[str]) -> tuple[list[str], list[str]]:
    """Packages with known vulnerabilities, each with their ids, and packages that pip-audit could
    not look up.
    """
    vulnerable: list[str] = []
    unknown: list[str] = []
    for pin in _without_conflicts(pins):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "requirements.txt"
            path.write_text("\n".join(pin) + "\n", encoding="utf-8")
            command = [
                pip_audit,
                "--requirement",
                str(path),
                "--no-deps",
                "--disable-pip",
                "--format",
                "json",
                "--progress-spinner",
                "off",
            ]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        answer = json.loads(done.stdout) if done.stdout.strip() else {"dependencies": []}
        for entry in answer["dependencies"] or [{"name": name} for name in pin]:
            if "version" not in entry:
                unknown.append(entry["name"])
            elif entry["vulns"]:
                ids = ", ".join(advisory["id"] for advisory in entry["vulns"])
                vulnerable.append(f"{entry['name']} {entry['version']}: {ids}")
    return vulnerable, unknown


def _without_conflicts(pins: list[str]) -> list[list[str]]:
    """Lists without a package in two versions, which pip-audit does not accept in one list."""
    lists: list[dict[str, str]] = []
    for pin in pins:
        name = pin.partition("==")[0]
        free = next((pinned for pinned in lists if name not in pinned), None)
        if free is None:
            lists.append(free := {})
        free[name] = pin
    return [list(pinned.values()) for pinned in lists]


def _lines(path: Path) -> list[str]:
    return [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
