"""The page as a person meets it: headless Chromium opens report.html from a file, on a desk, on a phone, in the dark.

Runs where a Chromium or Chrome is on the PATH (`apt-get install chromium`); elsewhere it is skipped, saying so.
"""

import browser
import pytest

pytestmark = pytest.mark.skipif(browser.executable() is None, reason=f"no browser on the PATH (any of {', '.join(browser.NAMES)})")


@pytest.fixture(scope="module")
def address():
    with browser.running() as found:
        yield found


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (320, False)])
def test_nothing_leaves_the_page_nothing_complains_nothing_overflows(whole, address, width, dark):
    async def story(page):
        await page.open(whole.html, width=width, dark=dark)
        paper = await page.do("getComputedStyle(document.body).backgroundColor")
        return page, await page.do("[document.documentElement.scrollWidth, innerWidth]"), paper

    page, (content, window), paper = browser.visit(address, story)
    assert page.complaints == []
    assert page.requests[0].startswith("file:")
    assert [url for url in page.requests[1:] if not url.startswith("data:")] == []
    assert content <= window == width
    assert (paper == "rgb(255, 255, 255)") is not dark


def test_every_figure_has_words_and_reads_its_values_by_pointer_and_by_key(whole, address):
    async def story(page):
        await page.open(whole.html, width=1280)
        texts = await page.do("[...document.querySelectorAll('figure svg')].map(s => [s.getAttribute('role'), s.getAttribute('aria-label')])")
        figures = await page.do("document.querySelectorAll('figure').length")
        await page.do("document.querySelector('#figure-effects .plot').focus()")
        read = "document.querySelector('#figure-effects .reading').textContent"
        seen = [await page.do(read)]
        for _ in range(3):
            await page.press("ArrowRight", 39)
            seen.append(await page.do(read))
        await page.press("Home", 36)
        home = await page.do(read)
        box = await page.do("(b => [b.x, b.y, b.width, b.height])(document.querySelector('#figure-loss-curves svg').getBoundingClientRect())")
        await page.do(f"scrollTo(0, {box[1]} - 200)")
        await page.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] / 2, y=200 + box[3] / 2)
        return texts, figures, seen, home, await page.do("document.querySelector('#figure-loss-curves .reading').textContent")

    texts, figures, seen, home, hovered = browser.visit(address, story)
    assert figures == 7
    assert len(texts) >= figures
    assert all(role == "img" and len(label) > 30 for role, label in texts)
    assert seen[0] == ""
    assert [text.split(":")[0] for text in seen[1:]] == ["M = 2", "unrestricted (M = 8)", "KV latent = 16"]
    assert "shown" in seen[1]
    assert home == seen[1]
    assert " at " in hovered


def test_a_table_sorts_by_click_and_by_key(whole, address):
    async def story(page):
        await page.open(whole.html, width=1280)
        column = "[...document.querySelectorAll('#table-effects tbody tr')].map(r => r.cells[{}].textContent)"
        head = "document.querySelectorAll('#table-effects thead th')[{}]"
        before = await page.do(column.format(1))
        await page.do(head.format(6) + ".querySelector('button').click()")
        clicked = await page.do(column.format(6))
        await page.do(head.format(1) + ".querySelector('button').focus()")
        await page.press("Enter", 13)
        once = await page.do(column.format(1))
        await page.press(" ", 32)
        twice = await page.do(column.format(1))
        return before, clicked, once, twice, await page.do(head.format(1) + ".getAttribute('aria-sort')"), await page.do("said.textContent")

    before, clicked, once, twice, sorted_by, said = browser.visit(address, story)
    assert clicked == ["32", "128", "128", "128"]
    assert once == before
    assert twice == before[::-1]
    assert sorted_by == "descending"
    assert "falling" in said


def test_a_legend_hides_a_series_and_print_is_light(whole, address):
    async def story(page):
        await page.open(whole.html, width=1280, dark=True)
        hidden = "[...document.querySelectorAll('#figure-loss-curves g.s1')].every(g => getComputedStyle(g).display === 'none')"
        before = await page.do(hidden)
        await page.do("document.querySelector('#figure-loss-curves [data-series=s1]').click()")
        after = await page.do(hidden)
        await page.send("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        return (
            before,
            after,
            await page.do("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('nav')).display]"),
        )

    assert browser.visit(address, story) == (False, True, ["rgb(255, 255, 255)", "none"])
