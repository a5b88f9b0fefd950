"""Are the pinned packages free of known holes? `make audit` runs it, and so does CI.

Every line of requirements/*.txt has to pin one version exactly, so that what is audited is what is
installed. The versions are compared with the advisories of the Python Packaging Authority by
pip-audit. Where these cannot be reached, as behind a mirror that has none, nothing is known, which
is said loudly and is no failure. Exit code 1: a line that is no pin, or a known hole.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

REQUIREMENTS = sorted((Path(__file__).resolve().parents[1] / "requirements").glob("?pu.txt"))
PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+")
PROBE = "jinja2==3.1.2"  # has known holes: whoever finds none in it has no advisories


def main(pip_audit: str) -> int:
    wrong = [
        f"{path.name}: {line}"
        for path in REQUIREMENTS
        for line in _lines(path)
        if not PIN.fullmatch(line)
    ]
    if wrong:
        print(f"error: no exact pin of a version: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    if not look_up(pip_audit, [PROBE])[0]:
        print(
            "=" * 100
            + (
                "\nAUDIT NOT DONE: the advisories cannot be reached from here. Run `make audit` "
                "where they can.\n"
            )
            + "=" * 100
        )
        return 0
    holes, unknown = look_up(
        pip_audit, sorted({line for path in REQUIREMENTS for line in _lines(path)})
    )
    for hole in holes:
        print(f"error: {hole}", file=sys.stderr)
    print(
        f"audit: {len(holes)} packages with known holes; of {len(unknown)} nothing is known: "
        f"{', '.join(unknown) or 'none'}"
    )
    return bool(holes)


def look_up(pip_audit: str, pins: list[str]) -> tuple[list[str], list[str]]:
    """Packages with known holes, each with the names of these, and packages that pip-audit could
    not ask about.
    """
    holes: list[str] = []
    unknown: list[str] = []
    for pin in _apart(pins):
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
                holes.append(
                    f"{entry['name']} {entry['version']}: "
                    f"{', '.join(hole['id'] for hole in entry['vulns'])}"
                )
    return holes, unknown


def _apart(pins: list[str]) -> list[list[str]]:
    """Lists in which no package comes twice: the two lists of requirements pin some in two
    versions.
    """
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
