"""A report's page in a real Chromium: nothing cut off, values by pointer and keys, zoom, legend, sorting, schemes."""

import re
import shutil

import numpy as np
import pytest
from made_runs import write_run

from fairseq_hash.reporting import page
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.comparison_page import comparison_page
from fairseq_hash.reporting.theme import DARK, LIGHT
from fairseq_hash.reporting.watching import current_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
LONG = "Hash with a rather long name, and/or_an_unbreakable_word_of_many_letters_in_it_"
PIXEL = b"\x89PNG\r\n\x1a\n" + bytes(8) + (400).to_bytes(4, "big")  # as much as the page reads of a picture


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Folders with `index.html`: of five models with two seeds and published figures, of 30 with long names, of one."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)

    def curve(end, experts):
        loads = {"layer1_load": [1.5 / experts, *[(1 - 1.5 / experts) / max(experts - 1, 1)] * (experts - 1)]}
        loads |= {"layer1_load_max": 1.5, "layer1_load_cv": 0.1, "layer1_dropped": 0.05}
        falls = end + 900 * np.exp(-np.arange(40) / 2) + rng.random(40)
        return [{"ppl": round(float(value), 3), **(loads if experts > 1 else {})} for value in falls]

    models = ("none", 1, 104), ("hash", 4, 97), ("hash", 16, 89), ("hash", 64, 84), ("switch", 16, 100)
    for router, experts, end in models:
        experiment = {"name": f"{router.title()} 1x{experts}", "table": "t", "vocabulary": 100, "corpus": "a corpus"}
        experiment["published"] = {"valid": f"{end - 2}.5 A", "test": f"{end - 1}.5 S"}
        for seed in (1, 2):
            place = folder / "several" / f"{router}{experts}-{seed}"
            evaluated = {"valid": end + seed / 10, "test": 1000 + end}
            record = {"router": router, "num_experts": experts, "parameters_total": 10**6 * experts}
            write_run(place, experiment, {"common.seed": seed}, evaluated, curve(end, experts), **record)
    for number in range(30):
        options, experiment = {"model.hash_seed": number}, {"name": f"{LONG}{number}"}
        values = curve(90 + number, 16)
        if number == 3:
            values[20:] = [{**value, "ppl": "nan"} for value in values[20:]]
        write_run(folder / "many" / str(number), experiment, options, intervals=values)
    write_run(folder / "one" / "run", {"name": "</script><img src=http://127.0.0.1:9/x>"}, router="none", num_experts=1)
    for name in ("several", "many", "one"):
        html = comparison_page(compare([folder / name], name), {"learning_curves.png": [PIXEL, PIXEL]})
        (folder / name / "index.html").write_text(html, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def look(browser, pages):
    """A function that opens a page; at the end, nothing may have been said on the console nor asked from anywhere."""
    opened, said, asked = [], [], []

    def look(name, width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        opened.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((pages / name / "index.html").as_uri())
        return tab

    yield look
    for context in opened:
        context.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked) and any(url.startswith("file:") for url in asked)


def ranges(chart):
    """Return what a chart shows: x and y from and to."""
    chart.page.wait_for_timeout(50)
    return chart.evaluate("f => ['x', 'y'].map(k => [f.plot.scales[k].min, f.plot.scales[k].max])")


def point_at(chart, line, point):
    """Return where a point of a line lies in the window, and its numbers as the page has them."""
    place = """(f, [line, point]) => {
        const {x, y} = JSON.parse(f.querySelector("script").textContent).lines[line];
        const box = f.plot.over.getBoundingClientRect();
        const left = box.left + f.plot.valToPos(x[point], "x"), top = box.top + f.plot.valToPos(y[point], "y");
        return [left, top, x[point], y[point]];
    }"""
    return chart.evaluate(place, [line, point])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["several", "many", "one"])
def test_nothing_is_cut_off(look, name, width, scheme):
    """The page never scrolls sideways, a table does in its own box; charts have the room that there is, and lines."""
    tab = look(name, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    inside = "e => { const b = e.getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth && b.width > 0 }"
    for element in tab.locator("figure.chart, .plot, .uplot, .legend button, .wide, h1, h2, h3, p:not(.unseen)").all():
        assert element.evaluate(inside), element.evaluate("e => e.outerHTML.slice(0, 200)")
    boxes = [chart.bounding_box() for chart in tab.locator("canvas").all()]
    assert len(boxes) >= 2 and all(box["height"] >= 300 and box["width"] >= min(0.85 * width, 550) for box in boxes)
    if name == "several" and width == 1280:  # all columns at once
        assert tab.evaluate("[...document.querySelectorAll('.wide')].every(e => e.scrollWidth <= e.clientWidth)")
    theme = {"light": LIGHT, "dark": DARK}[scheme]
    colours = page.colours_on_page(theme)
    rgb = [int(theme.paper[start : start + 2], 16) for start in (1, 3, 5)]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb({rgb[0]}, {rgb[1]}, {rgb[2]})"
    drawn = """f => {
        const c = f.querySelector("canvas"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        const seen = new Set(); for (let i = 0; i < d.length; i += 4) if (d[i + 3] === 255)
            seen.add("#" + [0, 1, 2].map(k => d[i + k].toString(16).padStart(2, "0")).join("")); return [...seen] }"""
    tab.wait_for_timeout(100)
    expected = {colours["neutral"]} if name == "one" else {colours["c0"], colours["ink"]}
    assert expected <= {*tab.locator("figure.chart").first.evaluate(drawn)}


def test_values_by_pointer(look):
    """The number under the pointer is the log's; away from all lines there is none."""
    tab = look("several")
    chart = tab.locator("figure.chart").first
    chart.scroll_into_view_if_needed()
    for line, point in ((1, 10), (3, 39), (5, 25)):
        left, top, x, y = point_at(chart, line, point)
        tab.mouse.move(left, top)
        words = chart.locator(".tip").inner_text()
        shown = float(re.search(r"\(log scale\): (\S+)", words)[1])
        assert f"Updates: {x}\n" in words and shown == pytest.approx(y, rel=0.01), words
    box = chart.locator(".u-over").bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 5, box["y"] + 5)
    assert not chart.locator(".tip").is_visible()
    experts = tab.locator("figure.chart").nth(2)
    experts.scroll_into_view_if_needed()
    tab.mouse.move(*point_at(experts, 0, 1)[:2])
    assert "Valid perplexity per token: 89.15 (89.1 to 89.2)" in experts.locator(".tip").inner_text()


def test_all_of_a_tip_is_in_sight(look):
    """Of long names, on a narrow screen, at both ends of the axis."""
    tab = look("many", 390)
    chart = tab.locator("figure.chart").first
    chart.scroll_into_view_if_needed()
    plot = chart.locator(".plot").bounding_box()
    for point in (3, 18, 20, 39):
        tab.mouse.move(*point_at(chart, 29, point)[:2])
        tip = chart.locator(".tip").bounding_box()
        assert plot["x"] <= tip["x"] and tip["x"] + tip["width"] <= plot["x"] + plot["width"]
        assert plot["y"] <= tip["y"] and tip["y"] + tip["height"] <= plot["y"] + plot["height"]


def test_values_by_keys(look):
    tab = look("several")
    chart = tab.locator("figure.chart").first
    plot, said = chart.locator(".plot"), chart.locator("[aria-live=polite]")
    for _ in range(60):
        tab.keyboard.press("Tab")
        if plot.evaluate("e => e === document.activeElement"):
            break
    else:
        pytest.fail("Tab does not reach the chart")
    lines = chart.evaluate("f => JSON.parse(f.querySelector('script').textContent).lines")

    def expect(line, point):
        value, name = lines[line]["y"][point], f"{lines[line]['name']}, {lines[line]['what']}"
        assert said.inner_text().startswith(f"{name}. Updates: {lines[line]['x'][point]}. Perplexity")
        assert float(said.inner_text().rsplit(" ", 1)[1].replace(",", "")) == pytest.approx(value, rel=1e-3)

    for key, line, point in (
        *(("ArrowRight", 0, 0), ("ArrowRight", 0, 1), ("Shift+ArrowRight", 0, 11), ("ArrowLeft", 0, 10)),
        *(("End", 0, 39), ("ArrowDown", 1, 39), ("Home", 1, 0), ("ArrowUp", 0, 0)),
    ):
        tab.keyboard.press(key)
        expect(line, point)
    tab.keyboard.press("End")
    whole = ranges(chart)
    tab.keyboard.press("+")
    (low, high), _ = ranges(chart)
    assert high - low == pytest.approx((whole[0][1] - whole[0][0]) / 2) and low < 40 < high
    tab.keyboard.press("0")
    assert ranges(chart) == whole
    assert "Arrow keys read values" in plot.get_attribute("aria-label")
    assert "Perplexity by updates" in plot.get_attribute("aria-label")


def test_zoom_and_legend(look):
    """By dragging, by buttons and by a double click; hidden lines are gone for the pointer; a reload keeps both."""
    tab = look("several")
    chart = tab.locator("figure.chart").first
    chart.scroll_into_view_if_needed()
    whole = ranges(chart)
    box = chart.locator(".u-over").bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.9 * box["height"], steps=4)
    tab.mouse.up()
    (left, right), (low, high) = zoomed = ranges(chart)
    assert left == pytest.approx(0.5 * whole[0][1], rel=0.02) and right == pytest.approx(0.75 * whole[0][1], rel=0.02)
    assert whole[1][0] < low < high < whole[1][1]
    button = chart.locator(".legend button").filter(has_text="None 1x1")
    assert button.get_attribute("aria-pressed") == "true"
    button.focus()
    tab.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    hidden = "f => f.plot.series.slice(1).map(s => s.show)"
    names = chart.evaluate("f => JSON.parse(f.querySelector('script').textContent).lines.map(l => l.name)")
    assert chart.evaluate(hidden) == [name != "None 1x1" for name in names]
    tab.reload()
    chart = tab.locator("figure.chart").first
    assert ranges(chart) == zoomed and chart.evaluate(hidden).count(False) == names.count("None 1x1")
    chart.get_by_role("button", name="Show all").click()
    assert ranges(chart) == whole
    chart.get_by_role("button", name="Zoom in").click()
    assert ranges(chart) != whole
    chart.scroll_into_view_if_needed()
    box = chart.locator(".u-over").bounding_box()
    tab.mouse.dblclick(box["x"] + 20, box["y"] + 20)
    assert ranges(chart) == whole


def test_a_watched_page_reloads_where_it_was_left(look, pages):
    """After a second it shows what was written meanwhile, scrolled, zoomed and sorted as before."""
    folder = pages / "watched"
    folder.mkdir()
    before, fault = current_page([pages / "several"], "First", "", 1)
    assert not fault
    (folder / "index.html").write_text(before.replace('data-reload="1"', 'data-reload="4"'), encoding="utf-8")
    tab = look("watched")
    chart = tab.locator("figure.chart").nth(1)
    tab.get_by_role("button", name="Model", exact=True).first.click()
    chart.get_by_role("button", name="Zoom in").click()
    tab.evaluate("scrollTo(0, 500)")
    zoomed, scrolled = ranges(chart), tab.evaluate("scrollY")
    assert scrolled == 500
    (folder / "index.html").write_text(before.replace("First", "Second"), encoding="utf-8")
    tab.get_by_role("heading", name="Second").wait_for(timeout=20_000)
    assert ranges(tab.locator("figure.chart").nth(1)) == zoomed and tab.evaluate("scrollY") == scrolled
    assert tab.locator("th").first.get_attribute("aria-sort") == "ascending"


def test_tables_are_sorted(look):
    """By numbers with units as numbers, by names as names, down and up and as it was; by keys as well; missing last."""
    tab = look("several")
    table = tab.locator("table").first

    def column(index):
        return [row.locator("td").nth(index).inner_text() for row in table.locator("tbody tr").all()]

    def press(heading):
        table.get_by_role("button", name=heading, exact=True).click()
        return table.locator("th").filter(has_text=heading).first.get_attribute("aria-sort")

    before = column(0)
    assert press("Valid perplexity") == "ascending"
    assert [float(text.split()[0]) for text in column(1)] == sorted(float(text.split()[0]) for text in column(1))
    assert column(0)[0] == "Hash 1x64"
    assert press("Valid perplexity") == "descending" and column(0)[0] == "None 1x1"
    assert press("Valid perplexity") == "none" and column(0) == before
    by_name = ["Hash 1x4", "Hash 1x16", "Hash 1x64", "None 1x1", "Switch 1x16"]
    assert press("Model") == "ascending" and column(0) == by_name
    press("Max load, training")
    assert press("Max load, training") == "descending" and column(0)[-1] == "None 1x1"
    button = table.get_by_role("button", name="Parameters", exact=True)
    button.focus()
    tab.keyboard.press("Enter")
    ascending = [h for h in table.locator("th").all() if h.get_attribute("aria-sort") == "ascending"]
    assert column(0)[0] == "None 1x1" and len(ascending) == 1


def test_names_do_nothing(look):
    """A name that would be a picture from elsewhere is text in the table, the legend and the tip."""
    tab = look("one")
    assert "</script><img src=http://127.0.0.1:9/x>" in tab.locator("tbody td").first.inner_text()
    assert "<img src=" in tab.locator(".legend button").first.inner_text()
    tab.locator(".plot").first.focus()
    tab.keyboard.press("ArrowRight")
    assert "<img src=" in tab.locator(".tip").first.inner_text() and tab.locator("img").count() == 0


def test_a_gap_is_no_point(look):
    """A training that diverged: the last value that can be read is the last finite one; the legend says nan."""
    tab = look("many")
    chart = tab.locator("figure.chart").first
    assert f"{LONG}3 nan" in chart.locator(".legend button").all_inner_texts()
    plot = chart.locator(".plot")
    plot.focus()
    for _ in range(4):
        tab.keyboard.press("ArrowDown")
    tab.keyboard.press("End")
    assert re.search(rf"{re.escape(LONG)}3, .*Updates: 20\.", chart.locator("[aria-live]").inner_text())


def test_without_scripts(look):
    tab = look("several", java_script_enabled=False)
    assert tab.locator("noscript img, img").count() == 1
    assert all(not chart.is_visible() for chart in tab.locator("figure.chart").all())


def test_what_a_page_asks_for_is_refused(browser, pages):
    """The policy, not only our care: a page that asks for a picture and for data gets neither."""
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((pages / "one" / "index.html").as_uri())
    asked = """() => new Promise((resolve) => {
        const refused = []; setTimeout(() => resolve(refused), 5000);
        document.addEventListener("securitypolicyviolation", (e) => {
            refused.push(e.effectiveDirective); if (refused.length === 2) resolve(refused.sort()) });
        new Image().src = "http://127.0.0.1:9/x"; fetch("http://127.0.0.1:9/x").catch(() => null) })"""
    assert tab.evaluate(asked) == ["connect-src", "img-src"]
    context.close()
