"""The page in headless Chromium: what its scripts do, and that nothing else runs or is fetched."""

import shutil
from itertools import combinations

import pytest
from report_samples import HOSTILE, sample, with_rows

from prism_assets.report.page import build_report
from prism_assets.report.rows import taken_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: install it (Debian: apt-get install chromium) to test a page"
)


class Opened:
    """A page in a window of its own, with what it wrote to the console and what it asked for."""

    def __init__(self, browser, path, *, width=1280, dark=False, scripts=True):
        self.said, self.asked = [], []
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
        )
        self.page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        if scripts:
            self.page.locator(".found").first.filter(has_text="rows").wait_for()

    def shown_rows(self) -> list[str]:
        """What the rows of the first list begin with, on the page of it that is seen."""
        return self.page.locator(".explorer").first.locator(".tabulator-row summary").all_text_contents()

    def found(self) -> str:
        return self.page.locator(".found").first.inner_text()

    def choose(self, **fields: str) -> None:
        """Fill in fields of the first search; what is not named is as at first."""
        form = self.page.locator(".explorer form").first
        form.get_by_role("button", name="Show all").click()
        for name, value in fields.items():
            field = form.locator(f"[name={name}]")
            if field.evaluate("one => one.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        self.page.wait_for_timeout(50)  # the list is laid out anew

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of the sample, whose texts are hostile."""
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(build_report(with_rows(sample())), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def opened(browser, path):
    return Opened(browser, path)


@pytest.fixture(scope="module")
def of_a_project(browser, two_versions):
    """The report of a project that was run."""
    return Opened(browser, two_versions.settings.storage.report / "report.html")


def test_nothing_fails_nothing_is_fetched_and_no_other_script_runs(opened, of_a_project):
    for one in (opened, of_a_project):
        assert one.said == []
        assert [url for url in one.asked if not url.startswith("data:")] == [one.page.url]


def test_the_policy_stops_scripts_of_others_and_eval(browser, path):
    one = Opened(browser, path)
    one.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    assert one.page.evaluate("window.ran") is None
    later = "new Promise(done => setTimeout(() => { try { done(eval('1')) } catch (error) { done(error.name) } }))"
    assert one.page.evaluate(later) == "EvalError"
    assert one.page.evaluate("fetch('data:,x').then(() => 'sent', () => 'refused')") == "refused"


def test_hostile_texts_stay_texts(opened):
    page = opened.page
    assert page.locator("[onerror], img[src='x'], iframe").count() == 0
    opened.choose()
    first = page.locator(".explorer .tabulator-row details").first
    first.locator("summary").click()
    first.locator("pre.prompt").wait_for(state="visible")
    assert first.locator("pre.prompt").inner_text() == f"{HOSTILE} prompt 0"
    assert page.evaluate("document.querySelectorAll('script').length") == 6  # four of the package, two of data
    assert page.locator(".explorer").first.get_by_role("gridcell", name=HOSTILE, exact=True).first.is_visible()
    assert opened.said == []


def test_a_click_on_a_heading_sorts_a_table(opened):
    table = opened.page.locator("table.comparison").first
    heading = table.get_by_role("columnheader", name="target preference")
    names = table.locator("tbody th")
    before = names.all_text_contents()
    heading.click()
    assert names.all_text_contents() == ["prism", "random", "base", "uniform"] != before
    assert heading.get_attribute("aria-sort") == "descending"
    heading.press("Enter")
    assert names.all_text_contents() == ["uniform", "base", "random", "prism"]
    rows = table.get_by_role("columnheader", name="rows")
    rows.click()
    assert names.all_text_contents()[-1] == "base"  # it has none


def test_the_list_is_sorted_by_a_click_too(opened):
    opened.choose()
    assert opened.shown_rows()[0] == f"{HOSTILE} prompt 0"
    # The second click: the first sorts upwards.
    heading = opened.page.locator(".explorer .tabulator-col[tabulator-field=n] .tabulator-col-title").first
    heading.click()
    heading.click()
    assert opened.shown_rows()[0] == f"{HOSTILE} prompt 39"
    opened.page.locator(".explorer .tabulator-col[tabulator-field=rank] .tabulator-col-title").first.click()


def test_search_and_filters_change_the_rows_shown(opened):
    def numbers() -> set[int]:
        return {int(text.rsplit(" ", 1)[1]) for text in opened.shown_rows()}

    opened.choose()
    assert opened.found() == "40 of 40 rows" and len(opened.shown_rows()) == 25
    opened.choose(words="PROMPT completion 12")
    assert opened.found() == "1 of 40 rows" and numbers() == {12}
    opened.choose(words="<script> prompt 17")
    assert numbers() == {17}
    opened.choose(source=" plain  one", shortest="10", longest="14")
    assert numbers() == {10, 11, 13, 14}
    opened.choose(lowest="0.5", highest="0.6")
    assert numbers() == {20, 21, 22, 23, 24, 25}  # scores 1 − number/50
    opened.choose(words="nowhere")
    assert opened.found() == "0 of 40 rows" and opened.page.get_by_text("No row fits.").first.is_visible()
    opened.choose(first="random")
    assert opened.found() == "0 of 0 rows"
    opened.choose(first="uniform")  # which has no scores
    assert opened.found() == "30 of 30 rows"
    assert not opened.page.locator(".explorer .tabulator-col[tabulator-field=score]").first.is_visible()


def test_a_row_unfolds_and_stays_so(browser, path):
    one = Opened(browser, path)
    row = one.page.locator(".explorer .tabulator-row").nth(1)
    folded = row.bounding_box()["height"]
    row.locator("summary").press("Enter")
    row.locator("pre.completion").wait_for(state="visible")
    one.page.wait_for_timeout(100)
    assert row.bounding_box()["height"] > folded + 50
    assert one.page.evaluate("document.activeElement.tagName") == "SUMMARY"
    one.page.set_viewport_size({"width": 500, "height": 900})
    one.page.wait_for_timeout(200)
    assert row.locator("pre.completion").is_visible() and one.overflow() == 0


def test_two_strategies_side_by_side_are_those_of_the_artefacts(of_a_project, two_versions):
    stage = two_versions.stage
    name = next(iter(stage.settings.targets))
    taken = {
        strategy: set(stage.lake.read_table(taken_rows(stage, name, strategy), ["id"])["id"].to_pylist())
        for strategy in stage.settings.strategies
    }

    def shown(**fields) -> set[str]:
        of_a_project.choose(**fields)
        return set(
            of_a_project.page.locator(".explorer").first.locator(".tabulator-row details .mono").all_text_contents()
        )

    for first, second in combinations(taken, 2):
        assert shown(first=first) == taken[first]
        assert shown(first=first, second=second, which="both") == taken[first] & taken[second]
        assert shown(first=first, second=second, which="only-first") == taken[first] - taken[second]
        assert shown(first=first, second=second, which="only-second") == taken[second] - taken[first]
    counts = [
        tuple(row.locator("td").all_text_contents())
        for row in of_a_project.page.locator("section.target").first.locator(".overlaps tbody tr").all()
    ]
    assert {(first, second): tuple(map(int, rest)) for first, second, *rest in counts} == {
        (first, second): (len(a & b), len(a - b), len(b - a))
        for (first, a), (second, b) in combinations(taken.items(), 2)
    }
    assert len(counts) == len(taken) * (len(taken) - 1) // 2


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_narrow_window_and_charts_follow_the_colours(browser, path, two_versions, dark):
    for place in (path, two_versions.settings.storage.report / "report.html"):
        one = Opened(browser, place, width=400, dark=dark)
        assert one.overflow() == 0
        assert one.page.evaluate("Chart.defaults.color") == ("#e4e8ee" if dark else "#222b35")
        one.page.emulate_media(color_scheme="light" if dark else "dark")
        one.page.wait_for_timeout(200)
        assert one.page.evaluate("Chart.defaults.color") == ("#222b35" if dark else "#e4e8ee")
        drawn = "[...document.querySelectorAll('.charts canvas, .map canvas')].map(one => one.clientWidth)"
        assert all(0 < width <= 400 for width in one.page.evaluate(drawn))
        assert one.said == []


def test_every_chart_has_its_picture_for_paper_and_for_browsers_without_scripts(opened, browser, path):
    page = opened.page
    figures = page.locator("figure").count()
    assert figures and page.locator("figure.drawn").count() == figures
    assert not page.locator("figure > img").first.is_visible() and page.locator("figure canvas").first.is_visible()
    page.emulate_media(media="print")
    assert page.locator("figure > img").first.is_visible() and not page.locator("figure canvas").first.is_visible()
    assert not page.locator(".explorer").first.is_visible() and page.locator(".static-rows").first.is_visible()
    page.emulate_media(media="screen")
    bare = Opened(browser, path, scripts=False)
    assert bare.page.locator(".verdict .use").first.is_visible()
    assert bare.page.locator("table.comparison td").first.is_visible()
    assert bare.page.locator(".overlaps td").first.is_visible() and bare.page.locator(".cut td").first.is_visible()
    assert bare.page.locator("figure > img").first.is_visible() and bare.page.locator(".static-rows").first.is_visible()
    assert not bare.page.locator(".explorer").first.is_visible() and not bare.page.locator(".map").first.is_visible()


@pytest.mark.parametrize("dark", [False, True])
def test_the_map_is_coloured_by_source_or_by_selection(browser, path, dark):
    one = Opened(browser, path, dark=dark)
    groups = (
        "Chart.getChart(document.querySelector('.map canvas')).data.datasets.map(one => [one.label, one.data.length])"
    )
    assert one.page.evaluate(groups) == [[HOSTILE, 20]]
    one.page.locator(".map select").select_option("prism")
    assert sorted(one.page.evaluate(groups)) == [["not taken", 10], ["taken by prism", 10]]


@pytest.mark.parametrize(("width", "dark", "real"), [(1280, False, True), (1280, True, False), (400, False, False)])
def test_axe_finds_nothing_serious(browser, path, two_versions, width, dark, real):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    one = Opened(
        browser, two_versions.settings.storage.report / "report.html" if real else path, width=width, dark=dark
    )
    one.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    found = axe.Axe().run(one.page).response["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")] == []
