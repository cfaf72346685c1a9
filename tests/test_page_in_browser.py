"""The page in a real browser: every control by mouse and keyboard, both widths, print, no request, no error."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from scaling import records
from scaling.fit import analyse
from scaling.laws.answers import comparison
from scaling.laws.payload import finite
from scaling.report.page import build
from tests import synthetic

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SLIDERS = ("budget", "inference", "unique", "deadline", "devices")
HOSTILE = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of 25 runs, one label of which is a script."""
    folder = tmp_path_factory.mktemp("results") / "synthetic"
    runs = synthetic.sweep_records()
    runs[0] = dataclasses.replace(runs[0], sweep={**runs[0].sweep, "labels": {"size": HOSTILE, "budget_flops": 3e11}})
    synthetic.write(folder, [dataclasses.replace(run, curve={name: [] for name in run.curve}) for run in runs])
    table = records.table(runs)
    fit = analyse(table, laws=("chinchilla",), bootstrap=40, source="synthetic").to_json()
    recounted = [row for row in comparison.conventions(table, bootstrap=0) if row["flops"] != "kaplan"]
    records.write_json(folder / "fit.json", fit | {"recounted": finite(recounted)})
    return build(folder)


@pytest.fixture
def open_page(browser, report):
    """Opens the page at a width; what it asked for or complained of fails the test."""
    opened, wrong = [], []

    def open_at(width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(r.url) if r.url != report.as_uri() else None)
        page.goto(report.as_uri())
        opened.append(context)
        return page

    yield open_at
    for context in opened:
        context.close()
    assert not [w for w in wrong if not w.startswith("data:")]


def told(page):
    page.wait_for_selector("#ask[data-drawn=true]")
    return page.locator("#ask .told").inner_text()


def press(page, selector, *keys):
    page.locator(selector).focus()
    for key in keys:
        page.keyboard.press(key)


def test_every_slider_moves_the_answer_by_keyboard(open_page):
    page = open_page()
    before = told(page)
    assert re.search(r"\d–\d", before.replace("\u200a", "")), "intervals"
    for name in SLIDERS:
        selector = f"input[name={name}]"
        said = page.locator(selector).get_attribute("aria-valuetext")
        press(page, selector, "ArrowLeft" if name == "unique" else "ArrowRight")
        assert page.locator(selector).get_attribute("aria-valuetext") != said
        page.wait_for_timeout(100)
        after = told(page)
        assert after != before, name
        before = after
    page.locator("select[name=hardware]").select_option("a100")
    page.wait_for_timeout(100)
    assert "A100" in told(page)


def test_a_slider_moves_by_mouse_and_far_out_forms_stand_for_intervals(open_page):
    page = open_page()
    box = page.locator("input[name=budget]").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    page.wait_for_timeout(100)
    assert "no interval is worth it there" in told(page)
    assert "forms" in told(page)


def test_what_the_panel_says_is_what_the_file_says(open_page, report):
    page = open_page()
    fit = json.loads((report.parent / "fit.json").read_text())
    press(page, "input[name=budget]", "Home")
    page.wait_for_timeout(100)
    losses = [float(v) for v in fit["ask"]["optimum"]["loss"].split()]
    assert f"{losses[0]:.4f}" in told(page)


def test_arrow_keys_and_the_mouse_show_a_run(open_page, report):
    page = open_page()
    chart, card = page.locator("#closer .chart"), page.locator("#closer .card")
    assert "arrow keys" in card.inner_text()
    seen = set()
    press(page, "#closer .chart", "Home")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowLeft", "End"):
        page.keyboard.press(key)
        seen.add(card.locator("code").inner_text())
    assert len(seen) >= 3
    assert seen <= {run.run_id for run in records.load_records(report.parent)}
    href = card.locator("a").get_attribute("href")
    assert (report.parent / href).is_file()
    page.keyboard.press("Escape")
    assert "arrow keys" in card.inner_text()
    chart.scroll_into_view_if_needed()
    page.keyboard.press("End")
    ring = page.locator("#closer .ring").bounding_box()
    page.keyboard.press("Escape")
    page.mouse.move(ring["x"] + 10, ring["y"] + 10)
    text = card.inner_text()
    for words in ("D/N", "±", "residual", "peak rate", "batch", "record"):
        assert words in text


def test_axes_switch_and_the_law_is_that_of_the_convention(open_page):
    page = open_page()
    note = page.locator("#closer .note")
    assert "fit.json)" in note.inner_text()
    press(page, "#closer .chart", "Home")
    before = page.locator("#closer .card").inner_text()
    page.locator("select[name=count]").select_option("total")
    assert "values alone" in note.inner_text()
    press(page, "#closer .chart", "Home")
    assert page.locator("#closer .card").inner_text() != before
    page.locator("select[name=up]").select_option("residual")
    page.locator("select[name=rule]").select_option("kaplan")
    assert "the runs stand alone" in note.inner_text()
    assert page.locator("select[name=up]").input_value() == "loss"
    for across in ("num_tokens", "flops"):
        page.locator("select[name=across]").select_option(across)
    press(page, "#closer .chart", "Home")
    assert "no law" in page.locator("#closer .card").inner_text()


def test_a_legend_entry_hides_its_group(open_page):
    page = open_page()
    first = page.locator("#closer .keys button").first
    press(page, "#closer .keys button >> nth=0", "Enter")
    assert first.get_attribute("aria-pressed") == "false"
    press(page, "#closer .chart", "Home")
    cards = set()
    for _ in range(30):
        cards.add(page.locator("#closer .card").inner_text())
        page.keyboard.press("ArrowRight")
    assert not any("3×10¹¹" in card for card in cards)
    first.click()
    assert first.get_attribute("aria-pressed") == "true"


def test_a_label_with_a_script_stays_text(open_page):
    page = open_page()
    assert page.title() == "synthetic: scaling laws"
    press(page, "#closer .chart", "Home")
    assert HOSTILE in page.locator("body").inner_text()


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_is_no_wider_than_the_window(open_page, width):
    page = open_page(width)
    told(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate("""() => [...document.querySelectorAll('#ask input, #closer .chart')]
      .filter(e => e.getBoundingClientRect().width < 150).length""")
    assert small == 0


def test_text_stands_out_from_its_ground(open_page):
    """WCAG 2.1, 1.4.3: a contrast of 4.5 at least."""
    page = open_page()
    press(page, "#closer .keys button >> nth=0", "Enter")
    low = page.evaluate("""() => {
      const parse = c => (c.match(/[\\d.]+/g) ?? []).map(Number);
      const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = c => c.slice(0, 3).map(v => linear(v / 255)).reduce(
        (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
        if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
      const out = [];
      for (const e of document.querySelectorAll('body *')) {
        const says = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!says || !e.getClientRects().length) continue;
        const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) out.push(e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 30));
      }
      return out; }""")
    assert not low


def test_without_javascript_figures_stand_and_controls_do_not(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("figure img").count() >= 8
    assert not page.locator("#ask, #closer").locator("visible=true").count()


def test_printed_the_controls_are_left_out(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.locator("#ask").is_visible()
    assert page.locator("figure img").first.is_visible()


def test_images_are_seen_within_the_page(open_page):
    page = open_page()
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert Path(page.url.removeprefix("file://")).suffix == ".html"
