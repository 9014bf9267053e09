"The pages in a real browser: nothing runs, nothing is fetched, everyone can read them."
from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_run import make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PAGES = ("flights/main/05_evaluate/report.html", "flights/main/index.html", "index.html")

HIT = "window.__hit=(window.__hit||0)+1;alert(1)"
PAYLOADS = [
    f"<script>{HIT}</script>",
    f"<img src=x onerror=\"{HIT}\">",
    f"<svg onload=\"{HIT}\">",
    f"<svg><script>{HIT}</script></svg>",
    f"<body onload=\"{HIT}\">",
    f"<iframe srcdoc='<script>parent.{HIT}</script>'></iframe>",
    f"<iframe src=\"javascript:parent.{HIT}\"></iframe>",
    f"<a href=\"javascript:{HIT}\" autofocus onfocus=\"{HIT}\">x</a>",
    f"[x](javascript:{HIT})",
    "![x](https://evil.example/x.png)",
    f"<details open ontoggle=\"{HIT}\">",
    f"<input autofocus onfocus=\"{HIT}\">",
    f"<video><source onerror=\"{HIT}\"></video>",
    f"<audio src=x onerror=\"{HIT}\">",
    f"<math><mtext></mtext><mglyph><style><img src=x onerror=\"{HIT}\"></style></mglyph></math>",
    f"</title><script>{HIT}</script>",
    f"</style><script>{HIT}</script>",
    f"</textarea><script>{HIT}</script>",
    f"\"><script>{HIT}</script>",
    f"' onmouseover='{HIT}' x='",
    f"\" autofocus tabindex=0 onfocus=\"{HIT}\" x=\"",
    f"--><script>{HIT}</script><!--",
    f"]]><script>{HIT}</script>",
    f"<object data=\"data:text/html,<script>{HIT}</script>\"></object>",
    f"<embed src=\"javascript:{HIT}\">",
    f"<form action=\"javascript:{HIT}\"><button autofocus>x</button></form>",
    "<meta http-equiv=\"refresh\" content=\"0;url=https://evil.example/\">",
    "<link rel=stylesheet href=https://evil.example/x.css><style>@import 'https://evil.example/y.css';body{background:url(https://evil.example/z)}</style>",
    f"<template><script>{HIT}</script></template><noscript><p title=\"</noscript><img src=x onerror={HIT}>\">",
    f"{{{{ ''.__class__ }}}}${{{HIT}}}<%= {HIT} %>$\\href{{javascript:{HIT}}}{{x}}$",
]


LIVE = "main script, iframe, object, embed, form, main style, main link, main meta, [onerror], [onload], [onfocus], [ontoggle], [onmouseover], [href^=javascript]"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    make_run(folder)
    make_run(folder, "churn", "first", ["customers leave"], verdict="go")
    make_run(folder, "churn", "second", ["customers stay"], verdict="inconclusive", phases=5)
    return folder


class Opened:
    "A page and everything it did while it was open."

    def __init__(self, browser: Any, file: Path, width: int = 1440, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests: list[str] = []
        self.console: list[str] = []
        self.dialogs: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(file.as_uri())

    @property
    def fetched(self) -> list[str]:
        "Requests beyond the file itself and the images inside it."
        return [url for url in self.requests[1:] if not url.startswith("data:image/")]

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def axe_faults(page: Any) -> list[str]:
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    page.evaluate((Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']}: {v['help']} ({v['nodes'][0]['html'][:160]})" for v in found if v["impact"] != "minor"]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_everyone_can_read_it(browser: Any, outputs: Path, name: str, scheme: str, width: int) -> None:
    with Opened(browser, outputs / name, width, scheme) as opened:
        page = opened.page
        page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert axe_faults(page) == []
        assert opened.fetched == [] and opened.console == [] and opened.dialogs == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert page.evaluate("() => [...document.images].every(i => i.complete && i.naturalWidth > 0)"), "an image is not shown"
        assert page.evaluate("() => document.querySelectorAll('h1').length") == 1 and page.evaluate("() => document.documentElement.lang") == "en"


def test_a_wide_screen_shows_a_table_whole(browser: Any, outputs: Path) -> None:
    cut = "() => [...document.querySelectorAll('.ph-scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.getAttribute('aria-label'))"
    for name in PAGES[:2]:
        with Opened(browser, outputs / name, 1440) as opened:
            opened.page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert opened.page.evaluate(cut) == []


def test_a_run_leads_with_what_was_promised(browser: Any, outputs: Path) -> None:
    with Opened(browser, outputs / PAGES[1]) as opened:
        told = opened.page.evaluate("() => [...document.querySelectorAll('.ph-headline dt')].map(e => e.textContent)")
        assert len(told) == len(set(told)) and told[0].startswith("ranking"), "the acceptance metric first, no number twice"
        listed = opened.page.evaluate("() => [...document.querySelectorAll('.ph-verdict li')].map(e => e.textContent)")
        assert len(listed) == len(set(listed)) > 0


def test_charts_follow_the_colour_scheme(browser: Any, outputs: Path) -> None:
    from PIL import Image

    def brightness(scheme: str) -> float:
        with Opened(browser, outputs / PAGES[0], 1440, scheme) as opened:
            assert opened.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 28, 34)"}[scheme]
            picture = Image.open(io.BytesIO(opened.page.locator(".ph-chart img").first.screenshot())).convert("L")
            return sum(value * count for value, count in enumerate(picture.histogram())) / (picture.width * picture.height)

    assert brightness("light") > 180 and brightness("dark") < 90


def test_a_phone_gets_a_chart_of_its_own(browser: Any, outputs: Path) -> None:
    sizes = {}
    for width in (390, 1440):
        with Opened(browser, outputs / PAGES[0], width) as opened:
            sizes[width] = opened.page.evaluate("() => document.querySelector('.ph-chart img').naturalWidth")
    assert sizes == {390: 360, 1440: 680}


def hostile(payload: str) -> list[dict[str, Any]]:
    "The payload in every form that an output can take."
    return [
        {"output_type": "execute_result", "metadata": {}, "data": {"text/html": f"<table><tr><td>{payload}</td></tr></table>", "text/plain": "x"}},
        {"output_type": "display_data", "metadata": {}, "data": {"application/javascript": HIT, "text/plain": payload}},
        {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": payload}},
        {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{payload}<script>{HIT}</script></svg>"}},
        {"output_type": "stream", "name": "stdout", "text": payload},
        {"output_type": "error", "ename": payload, "evalue": payload, "traceback": []},
    ]


@pytest.mark.parametrize("ten", range(3))
def test_text_from_data_never_runs(browser: Any, tmp_path: Path, ten: int) -> None:
    assert len(PAYLOADS) == 30
    run = make_run(tmp_path, texts=PAYLOADS[10 * ten : 10 * ten + 10], extra=hostile)
    for file in [*sorted(run.glob("*/report.html")), run / "index.html", tmp_path / "index.html"]:
        with Opened(browser, file) as opened:
            page = opened.page
            page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
            page.mouse.move(200, 300)
            for _ in range(4):
                page.keyboard.press("Tab")
            assert page.evaluate("() => window.__hit") is None and opened.dialogs == [] and opened.console == [], file
            assert opened.fetched == [] and page.url == file.as_uri()
            assert page.evaluate(f"() => document.querySelectorAll({LIVE!r}).length") == 0, file
            assert page.evaluate("() => document.querySelectorAll('script').length") == (file.parent == tmp_path)


def test_the_policy_stops_what_a_sanitiser_might_miss(browser: Any, outputs: Path, tmp_path: Path) -> None:
    made = (outputs / PAGES[0]).read_text(encoding="utf-8")
    holed = tmp_path / "holed.html"
    holed.write_text(made.replace("</h1>", f"</h1><script>{HIT}</script><img src=x onerror='{HIT}'><img src='https://evil.example/x.png'>", 1), encoding="utf-8")
    with Opened(browser, holed) as opened:
        assert opened.page.evaluate("() => window.__hit") is None and opened.dialogs == []
        assert any("Content Security Policy" in text for text in opened.console)


def test_the_keyboard_reaches_every_table(browser: Any, outputs: Path) -> None:
    with Opened(browser, outputs / PAGES[0], 390) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.className") == "skip"
        wanted = page.evaluate("() => [...document.querySelectorAll('.ph-scroll')].filter(e => !e.closest('details:not([open])')).length")
        reached: set[str] = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            found = page.evaluate("""() => { const e = document.activeElement;
                return e.classList.contains('ph-scroll') ? String([...document.querySelectorAll('.ph-scroll')].indexOf(e)) + '|' + e.getAttribute('aria-label') : '' }""")
            reached |= {found} - {""}
        assert len(reached) == wanted > 2 and all(name.split("|")[1] for name in reached)


def column(page: Any, number: int) -> list[str]:
    return page.evaluate(f"() => [...document.querySelectorAll('.portal tbody tr')].filter(r => !r.hidden).map(r => r.cells[{number}].textContent.trim())")


def test_the_portal_sorts_by_keyboard(browser: Any, outputs: Path) -> None:
    with Opened(browser, outputs / "index.html") as opened:
        page = opened.page
        assert column(page, 1) == ["first", "second", "main"]
        head = page.get_by_role("button", name="run", exact=True)
        head.focus()
        page.keyboard.press("Enter")
        assert column(page, 1) == ["first", "main", "second"]
        page.keyboard.press("Enter")
        assert column(page, 1) == ["second", "main", "first"]
        assert page.locator("th[aria-sort]").count() == 1 and page.locator("th[aria-sort=descending]").text_content() == "run"
        page.get_by_role("button", name="phases").click()
        assert column(page, 4) == ["5 of 10", "10 of 10", "10 of 10"]     # by number, not by text
        assert opened.console == []


def test_the_portal_filters_offline(browser: Any, outputs: Path) -> None:
    with Opened(browser, outputs / "index.html") as opened:
        page = opened.page
        page.context.set_offline(True)
        page.get_by_label("Find").fill("CHURN first")
        assert column(page, 1) == ["first"] and page.locator("#told").text_content() == "1 of 3 runs"
        page.get_by_label("Find").fill("")
        page.get_by_label("Verdict").select_option("no-go")
        assert column(page, 0) == ["flights"]
        page.get_by_label("Find").fill("nothing like it")
        assert column(page, 0) == [] and page.locator("#told").text_content() == "0 of 3 runs"


def test_without_scripts_the_portal_is_whole(browser: Any, outputs: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((outputs / "index.html").as_uri())
    assert page.locator(".portal tbody tr").count() == 3 and not page.locator(".tools").is_visible()
    page.get_by_role("link", name="second").click()
    assert page.url.endswith("churn/second/index.html")
    page.get_by_role("link", name="Is it good enough").click()
    assert page.url.endswith("05_evaluate/report.html")
    page.get_by_role("link", name="All runs").click()
    assert page.url == (outputs / "index.html").as_uri()
    context.close()


def test_paper_shows_what_is_folded(browser: Any, outputs: Path) -> None:
    with Opened(browser, outputs / PAGES[0], 1440, "dark") as opened:
        page = opened.page
        page.emulate_media(media="print")
        assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator(".skip").is_visible() and not page.locator(".top nav").is_visible()
        assert page.locator("details table").first.bounding_box()["height"] > 20
        assert page.pdf(print_background=True).startswith(b"%PDF")
