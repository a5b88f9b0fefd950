"""Screenshots of a report (or any HTML file) in Chromium: light, dark and at the width of a phone.

    python -m dev.screenshot outputs/ontology/report.html docs/images/report
    python -m dev.screenshot outputs/ontology/report.html docs/images/scores --section scores

The first command writes docs/images/report-light.png, report-dark.png and report-phone.png. The
script needs the `dev` extra, and chromium or google-chrome on PATH.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

VIEWS = {"light": ("light", 1280, 900), "dark": ("dark", 1280, 900), "phone": ("light", 390, 844)}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dev.screenshot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path, help="prefix of the file names")
    parser.add_argument("--section", help="id of a heading: show its section alone")
    parser.add_argument(
        "--full", action="store_true", help="the whole page, not just the first screen"
    )
    arguments = parser.parse_args()
    if not arguments.page.exists():
        raise SystemExit(f"error: {arguments.page} does not exist")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit(
            "error: neither chromium nor google-chrome is on PATH: install one of them"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, (scheme, width, height) in VIEWS.items():
            page = browser.new_page(
                color_scheme=scheme, viewport={"width": width, "height": height}
            )
            page.goto(arguments.page.resolve().as_uri())
            path = Path(f"{arguments.output}-{name}.png")
            if arguments.section:
                page.locator(f"section[aria-labelledby='{arguments.section}']").screenshot(
                    path=path
                )
            else:
                page.screenshot(path=path, full_page=arguments.full)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
