"""The page in a real browser: what a reader sees, and that nothing leaves the machine."""

import re
import shutil

import pytest

from ipt.evaluation.task_types import multiple_choice
from ipt.pipeline.provenance import Record, SourceRecord
from ipt.report.cli import job_arms
from ipt.report.html import write_report
from ipt.report.scores import Arm
from tests.report.report_cases import choice_predictions, evaluation, training, write_evaluation
from tests.sweeps.sweep_cases import sweep_jobs

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
HOSTILE = (
    "</pre><script>window.broken = 1</script><img src=x onerror='window.broken = 2'><svg "
    "onload='window.broken = 3'>"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Contrast of each text with what is behind it: colours as the browser has computed them,
# transparent layers laid over each other.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255); };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => value * a + under[i] * (1 - a));
  const ground = element => {
    const own = rgba(getComputedStyle(element).backgroundColor);
    if (own[3] === 1 || !element.parentElement) return own.slice(0, 3);
    return over(own, ground(element.parentElement)); };
  const luminance = colour => colour
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05); };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || element.closest("script, style") || !element.checkVisibility()) continue;
    const behind = ground(element.closest("svg")?.parentElement ?? element);
    const style = getComputedStyle(element);
    const ink = rgba(element.closest("svg") ? style.fill : style.color);
    found.push([ratio(over(ink, behind), behind), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    jobs = sweep_jobs(folder / "jobs", seeds=(0, 1))
    start = Arm("start", None, evaluation(folder / "start", 0.25, 3.0))
    rows = choice_predictions([i % 3 > 0 for i in range(100)], 0.3)
    tasks = dict.fromkeys(("pubmedqa", "chemprot", "rct", "mqp", "usmle"), (multiple_choice, rows))
    published = {task: {"Instruct PT-8B": 60.0 + place} for place, task in enumerate(tasks)}
    scored = write_evaluation(folder / "medicine", tasks, published)
    instruct = Arm(
        "instruct",
        training(folder / "instruct", {"raw": 0.5, "instruction": 0.5}),
        scored,
        published="Instruct PT-8B",
    )
    record = Record(
        "instruct", 0, {"instruction": SourceRecord(1000, 1280, 1.28)}, 50, 5, 60, 1.5e9, None, 75.0
    )
    write_report(
        folder,
        title="A page to look at",
        config_yaml="name: look\n" * 50 + HOSTILE,
        arms=[start, instruct, *job_arms(jobs)],
        pairs=None,
        texts=None,
        stages=[{"name": "corpus", "seconds": 3.0, "reused": True, "stats": {"documents": 2}}],
        quality={"pairs": 3, "kinds": {"definition": 3}},
        facts={
            "model": "embedded:tiny",
            "command": "python -m ipt reproduce " + "experiment=look " * 20,
        },
        jobs=jobs,
        over_ratios=True,
        records=[record],
    )
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture
def open_page(browser, report):
    """Opens the page; at the end of a test nothing may have been asked of the network, nor
    complained about.
    """
    contexts, asked, said = [], [], []

    def open_(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(report)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert set(asked) == {report} and said == []


def cells(page, label: str, column: int) -> list[str]:
    return page.locator(
        f"[aria-label='{label}'] tbody tr :nth-child({column + 1}):is(td, th)"
    ).all_inner_texts()


def test_a_click_on_a_heading_sorts_by_its_numbers(open_page):
    page = open_page()
    heading = page.locator("[aria-label='Tokens per source'] th").nth(4)
    before = cells(page, "Tokens per source", 4)
    heading.get_by_role("button").click()
    numbers = [int(text.replace(",", "")) for text in cells(page, "Tokens per source", 4)]
    assert (
        heading.get_attribute("aria-sort") == "ascending"
        and numbers == sorted(numbers)
        and len(set(numbers)) > 2
    )
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    after = cells(page, "Tokens per source", 4)
    assert after == [f"{number:,}" for number in reversed(numbers)] and sorted(after) == sorted(
        before
    )


def test_what_a_config_says_is_never_markup(open_page):
    page = open_page()
    assert page.evaluate("window.broken") is None
    assert page.evaluate("text => document.body.textContent.includes(text)", HOSTILE)


def test_all_of_it_works_by_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.url.endswith("#result")
    names = page.locator("[aria-label='All scores'] th button")
    names.nth(2).focus()
    page.keyboard.press("Enter")
    models = cells(page, "All scores", 2)
    assert models == sorted(models) and len(set(models)) > 5
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # one sees where one is


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_as_computed(open_page, scheme):
    page = open_page(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    assert dark == (scheme == "dark")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 300
    assert [pair for pair in found if pair[0] < 4.5] == []


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_only_tables_and_figures_scroll_sideways(open_page, width):
    page = open_page(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    regions = page.locator("[role=region]")
    assert regions.count() > 8
    wide = [
        region
        for region in regions.all()
        if region.evaluate("region => region.scrollWidth > region.clientWidth")
    ]
    assert all(region.get_attribute("tabindex") == "0" for region in wide) and (wide or width > 390)


def test_on_a_laptop_five_models_with_seeds_and_what_their_differences_say_need_no_scrolling(
    browser, tmp_path
):
    arms = [Arm("start", None, evaluation(tmp_path / "start", 0.25, 3.0))]
    for name, right in {
        "vanilla": 0.3,
        "vanilla_repeated": 0.5,
        "instruct": 0.9,
        "detached": 0.3,
    }.items():
        for seed in (0, 1, 2):
            folder = tmp_path / f"{name}-{seed}"
            arms.append(
                Arm(
                    name,
                    training(folder, {"raw": 1}),
                    evaluation(folder, right + 0.025 * seed, 3.0),
                    seed,
                )
            )
    write_report(
        tmp_path,
        title="Five models",
        config_yaml="",
        arms=arms,
        pairs=None,
        texts=None,
        stages=[],
        quality={},
        facts={},
    )
    page = browser.new_page(viewport={"width": 1280, "height": 844})
    page.goto((tmp_path / "report.html").as_uri())
    for label in ("Main measures", "All scores"):
        assert {"▲ better", "○ n.s."} <= set(cells(page, label, 10))
        region = page.locator(f"[aria-label='{label}']")
        assert region.evaluate("region => region.scrollWidth") == region.evaluate(
            "region => region.clientWidth"
        )
    page.close()


def test_a_screen_reader_finds_its_way(open_page):
    page = open_page()
    snapshot = page.locator("body").aria_snapshot()
    for landmark in (
        "banner",
        'region "Comparison with the paper"',
        'navigation "Contents"',
        "main",
        'region "Mixture ratio"',
        'region "Jobs"',
        "contentinfo",
    ):
        assert f"- {landmark}" in snapshot, landmark
    assert re.search(r'img "Scores against the ratio of instruction\. .*best at ', snapshot)
    nameless = page.locator("button, a, [role=img], [role=region]").evaluate_all(
        "all => all.filter(one => !(one.getAttribute('aria-label') || "
        "one.textContent).trim()).length"
    )
    assert nameless == 0


def test_the_papers_figures_and_the_run_record_are_shown(open_page):
    page = open_page()
    row = page.locator("[aria-label='Comparison with the paper'] tbody tr")
    assert row.count() == 6
    assert row.nth(5).inner_text().split()[:7] == [
        "average",
        "of",
        "medicine",
        "66.0%",
        "62.0%",
        "+4.0",
        "−0.2",
    ]
    assert "1.50e+09 unknown 0:01:15" in " ".join(
        page.locator("[aria-label='Run record'] tbody tr").first.inner_text().split()
    )


def test_without_scripts_it_reads_the_same(open_page):
    page = open_page(java_script_enabled=False)
    assert (
        page.locator("h2").all_inner_texts()[0] == "Results"
        and page.locator("th button").count() == 0
    )
