"The operators' page in a real browser, before a real service's handler: read by everyone, worked by keyboard, closed to strangers."
from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import deploy_world as world
from pipeline.core.errors import InputError
from pipeline.data.contract import target_values
from pipeline.deploy.handler import Service
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.deploy.tokens import Tokens, make_token
from pipeline.rollout.live import ACTIONS, Live
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from test_browser import CHROMIUM, HIT, PAYLOADS, axe_faults

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")


class Paper:
    "A desk that keeps its rollout in a variable."

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str, int | None]] = []
        self.extra: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        self.rollout: dict[str, Any] = {"version": 3, "status": "running", "share": 25.0, "stages": [1.0, 5.0, 25.0, 50.0, 100.0], "revision": 7,
                                        "why": "review 2 of 4 of this stage"}
        self.said.clear()
        self.extra.clear()

    def state(self) -> dict[str, Any]:
        at = [f"12:{i:02d}" for i in range(30)]
        return {"problem": "flights", "subject": "tailnum", "rollout": dict(self.rollout),
                "plan": {"live": 2, "canary": 3, "share": 25.0, "slice": "origin = JFK", "revision": 12, "by": "controller"},
                "log": "", "traffic": [{"role": r, "version": v, "requests": n, "per_s": n / 900, "refused": 2 * e, "errors": e, "error_share": e / n, "p50_ms": .31, "p99_ms": 2.4}
                            for r, v, n, e in (("live", 2, 41_310, 3), ("canary", 3, 13_702, 1))],
                "minutes": [{"at": a, "live_rate": 46 + i % 5, "canary_rate": 15 + i % 3, "live_ms": 2.1, "canary_ms": None if i < 9 else 2.4, "live_failed": 0.0,
                             "canary_failed": None if i < 9 else .02} for i, a in enumerate(at)],
                "tests": [{"name": "not worse", "now": -.0041, "low": -.0083, "high": .0007, "boundary": .005, "evidence": 3.1, "needed": 100.0, "state": "quiet"},
                          {"name": "good enough for the next share", "now": -.0041, "low": -.0083, "high": .0007, "boundary": .01, "evidence": 88.0, "needed": 100.0, "state": "quiet"},
                          {"name": "errors", "now": 7e-5, "low": None, "high": None, "boundary": 7e-5, "evidence": 1.0, "needed": 100.0, "state": "quiet"}],
                "events": [{"at": "2026-11-21 12:20", "what": "5 % → 25 %", "by": "controller", "why": "at most 0.02 worse: shown by 271 outcomes"}], **self.extra}

    def act(self, action: str, by: str, reason: str, revision: int | None) -> str:
        if revision not in (None, self.rollout["revision"]):
            raise InputError(f"the rollout is at revision {self.rollout['revision']}, not {revision}; look again")
        self.said.append((action, by, reason, revision))
        status = {"hold": "held", "resume": "running", "promote": "promoted", "back": "rolled back"}[action]
        self.rollout |= {"status": status, "revision": self.rollout["revision"] + 1, "why": f"{by}: {reason}"}
        return f"The rollout is {status} now."


class Carrier(BaseHTTPRequestHandler):
    "Carries bytes to `Service.handle` and back; nothing else."

    def answer(self) -> None:
        service: Service = self.server.service  # type: ignore[attr-defined]
        self.server.paths.append((self.command, self.path))  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers, out = service.handle(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        self.send_response(status)
        for name, value in [*headers, ("content-length", str(len(out)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(out)

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    frame, contract = world.rows("binary", 300), world.contract("binary")
    model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 3}))
    return Predictor(model, make_schema(contract, frame), .4, "flights", 3)


@pytest.fixture(scope="module")
def office(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    "Desk, tokens, and a service that answers on a port of its own."
    file = tmp_path_factory.mktemp("office") / "tokens"
    secrets = {name: make_token(file, name, [role]) for name, role in (("ann", "operator"), ("bob", "observer"), ("shop", "caller"))}
    desk = Paper()
    service = Service(predictor, tokens=Tokens(file=file), hosts=("127.0.0.1",), extensions=Live("flights", desk).extensions())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Carrier)
    server.service, server.paths = service, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"desk": desk, "service": service, "server": server, "url": f"http://127.0.0.1:{server.server_port}/operate", **secrets}
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fresh(office: dict[str, Any]) -> None:
    office["desk"].reset()
    office["service"].extensions["GET", "/operate/state"].answer.__self__._held = (-1e9, {})


# -- who may do what

def ask(service: Service, method: str, path: str, token: str = "", body: bytes = b"", **headers: str) -> int:
    given = {"host": "127.0.0.1", "content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {}), **headers}
    return service.handle(method, path, given, body)[0]


def test_looking_and_acting_are_different_rights(office: dict[str, Any], predictor: Predictor) -> None:
    act = b'{"reason": "errors since noon"}'
    for who, page, state, action in (("", 200, 401, 401), ("shop", 200, 403, 403), ("bob", 200, 200, 403), ("ann", 200, 200, 200)):
        token = office.get(who, "")
        found = [ask(office["service"], *asked) for asked in (("GET", "/operate", token), ("GET", "/operate/state", token), ("POST", "/operate/hold", token, act))]
        assert found == [page, state, action], who
    assert [said[:2] for said in office["desk"].said] == [("hold", "ann")]
    alone = Service(predictor, extensions=Live("flights", Paper()).extensions())
    assert [ask(alone, "POST", f"/operate/{a}", body=act) for a in ACTIONS] == [403] * 4 and ask(alone, "GET", "/operate/state") == 200


def test_another_page_cannot_press_the_buttons(office: dict[str, Any]) -> None:
    act, ann = b'{"reason": "errors since noon"}', office["ann"]
    assert ask(office["service"], "POST", "/operate/back", ann, act, origin="https://evil.example") == 403
    assert ask(office["service"], "POST", "/operate/back", ann, act, host="evil.example") == 421
    assert ask(office["service"], "POST", "/operate/back", ann, b"reason=errors", **{"content-type": "application/x-www-form-urlencoded"}) == 415
    assert office["desk"].said == []


def test_the_page_is_sealed_by_its_header(office: dict[str, Any]) -> None:
    _, headers, body = office["service"].handle("GET", "/operate", {"host": "127.0.0.1"})
    sent = dict(headers)
    assert "default-src 'none'" in sent["content-security-policy"] and "unsafe" not in sent["content-security-policy"] and sent["x-frame-options"] == "DENY"
    assert b"flights" in body and b"41310" not in body and sent["cache-control"] == "no-store"


def test_a_hundred_lookers_are_one_reader(office: dict[str, Any]) -> None:
    desk, read = office["desk"], []
    desk.state = lambda: read.append(1) or Paper.state(desk)
    live = Live("flights", desk)
    service = Service(office["service"].predictor, tokens=office["service"].tokens, extensions=live.extensions())
    assert [ask(service, "GET", "/operate/state", office["bob"]) for _ in range(100)] == [200] * 100
    assert len(read) <= 3
    del desk.state


# -- in a browser

def await_in(page: Any, expression: str, tries: int = 300) -> None:
    "Poll from outside: the page's policy forbids `wait_for_function` to evaluate text inside it."
    for _ in range(tries):
        if page.evaluate(f"() => Boolean({expression})"):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


class Opened:
    "A page and everything it did while it was open."

    def __init__(self, browser: Any, url: str, width: int = 1440, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" and "401" not in message.text and "409" not in message.text else None)
        self.page.goto(url)

    def enter(self, token: str) -> Any:
        "Show a token, by keyboard, and wait for the state."
        self.page.get_by_label("Bearer token").wait_for()
        self.page.get_by_label("Bearer token").focus()
        self.page.keyboard.type(token)
        self.page.keyboard.press("Enter")
        self.page.get_by_role("heading", name="rolling out version 3").wait_for()
        return self.page

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@needs_browser
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1440, "dark")])
def test_everyone_can_read_it(browser: Any, office: dict[str, Any], width: int, scheme: str) -> None:
    with Opened(browser, office["url"], width, scheme) as opened:
        opened.page.get_by_label("Bearer token").wait_for()
        assert axe_faults(opened.page) == []
        page = opened.enter(office["ann"])
        assert axe_faults(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert page.evaluate("() => document.querySelectorAll('h1').length") == 1 and page.evaluate("() => document.documentElement.lang") == "en"
        assert page.locator("[aria-current=step]").text_content() == "25 %" and page.locator("#tests tr").count() == 3
        assert page.locator("#traffic tr").nth(1).text_content() == "canaryversion 313,70215.2210.01 %0.312.4"
        assert page.get_by_role("img", name="evidence 88 of 100 needed").count() == 1 and page.get_by_role("img", name="Answers a second").count() == 1
        told = [page.locator(f"#{name} svg").get_attribute("aria-label") for name in ("slow", "failed")]
        assert told == ["Milliseconds, 99th percentile: live 2.1, canary 2.4 now; at most 2.4 in the time shown", "Errors: live 0 %, canary 2 % now; at most 2 % in the time shown"]
        assert {url.split("/operate")[0] for url in opened.requests} == {office["url"].removesuffix("/operate")} and opened.faults == []


@needs_browser
def test_an_operator_holds_a_rollout_by_keyboard(browser: Any, office: dict[str, Any]) -> None:
    with Opened(browser, office["url"]) as opened:
        page = opened.enter(office["ann"])
        page.get_by_role("button", name="Hold").focus()
        page.keyboard.press("Enter")
        assert "reason is needed" in page.locator("#said").text_content() and page.evaluate("() => document.activeElement.id") == "reason"
        page.keyboard.type("errors at gate 12")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("() => document.activeElement.closest('dialog').open") and "errors at gate 12" in page.locator("#sure-text").text_content()
        assert axe_faults(page) == []
        page.keyboard.press("Escape")
        assert office["desk"].said == [] and page.evaluate("() => document.activeElement.id") == "do-hold"
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        page.locator("#said", has_text="The rollout is held now.").wait_for()
        assert office["desk"].said == [("hold", "ann", "errors at gate 12", 7)]
        await_in(page, "document.getElementById('announce').textContent.startsWith('Rollout held at 25 %')")
        assert page.get_by_role("button", name="Hold").get_attribute("aria-disabled") == "true"
        assert page.get_by_role("button", name="Resume").get_attribute("aria-disabled") == "false"


@needs_browser
def test_back_from_the_page_and_a_move_that_came_too_late(browser: Any, office: dict[str, Any]) -> None:
    with Opened(browser, office["url"]) as opened:
        page = opened.enter(office["ann"])
        page.get_by_label("Pause updates").check()
        office["desk"].rollout["revision"] = 8                       # somebody else was quicker
        page.get_by_label("Reason").fill("wrong answers for JFK")
        page.locator("#do-back").click()
        page.locator("#sure-yes").click()
        page.locator("#said", has_text="is at revision 8, not 7").wait_for()
        assert office["desk"].said == []
        page.get_by_label("Pause updates").uncheck()
        await_in(page, "held.rollout.revision === 8")
        page.locator("#do-back").click()
        page.locator("#sure-yes").click()
        page.locator("#said", has_text="The rollout is rolled back now.").wait_for()
        page.get_by_role("heading", name="version 3 was rolled back").wait_for()
        assert office["desk"].said == [("back", "ann", "wrong answers for JFK", 8)]


@needs_browser
def test_a_log_that_is_still_read_keeps_nobody_from_acting(browser: Any, office: dict[str, Any]) -> None:
    desk = office["desk"]
    desk.extra |= {"log": "The log is being read; a long one takes a while.", "traffic": [], "minutes": []}
    with Opened(browser, office["url"]) as opened:
        opened.page.get_by_label("Bearer token").wait_for()
        assert [opened.page.locator(f"#{name}-none").get_attribute("hidden") for name in ("traffic", "tests", "events")] == [""] * 3, "nothing is known yet"
        page = opened.enter(office["ann"])
        assert page.locator("#traffic-none").text_content() == desk.extra["log"] and page.locator("#traffic-box").is_hidden()
        page.get_by_label("Reason").fill("wrong answers for JFK")
        page.locator("#do-back").click()
        page.locator("#sure-yes").click()
        page.locator("#said", has_text="The rollout is rolled back now.").wait_for()
        desk.extra |= {"log": ""}
        page.locator("#traffic-none", has_text="No answers were logged in this time.").wait_for()
        desk.extra.clear()
        page.locator("#traffic-none").wait_for(state="hidden")
        assert page.locator("#traffic tr").count() == 2


@needs_browser
def test_an_observer_looks_and_is_told_why_not_more(browser: Any, office: dict[str, Any]) -> None:
    with Opened(browser, office["url"]) as opened:
        page = opened.page
        page.get_by_label("Bearer token").fill("nonsense")
        page.keyboard.press("Enter")
        page.get_by_text("This token is not known.").wait_for()
        page = opened.enter(office["bob"])
        page.get_by_label("Reason").fill("I would like to")
        page.get_by_role("button", name="Promote").focus()
        page.keyboard.press("Enter")
        page.get_by_text("Not now: You look as bob").wait_for()
        assert office["desk"].said == [] and not page.locator("#sure").is_visible()


@needs_browser
def test_text_from_people_and_data_never_runs(browser: Any, office: dict[str, Any]) -> None:
    desk = office["desk"]
    desk.extra |= {"events": [{"at": p, "what": p, "by": p, "why": p} for p in PAYLOADS], "subject": PAYLOADS[0], "problem": PAYLOADS[1]}
    desk.rollout["why"] = PAYLOADS[2] + HIT
    with Opened(browser, office["url"]) as opened:
        page = opened.enter(office["ann"])
        await_in(page, f"document.querySelectorAll('#events tr').length === {len(PAYLOADS)}")
        assert page.evaluate("() => window.__hit") is None and opened.faults == []
        assert page.evaluate("() => document.querySelectorAll('#events *:not(tr):not(td):not(th)').length") == 0


@needs_browser
def test_paused_it_asks_nothing_and_an_end_of_the_service_is_told(browser: Any, office: dict[str, Any], predictor: Predictor) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Carrier)
    server.service, server.paths = office["service"], []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Opened(browser, f"http://127.0.0.1:{server.server_port}/operate") as opened:
        page = opened.enter(office["ann"])
        page.get_by_label("Pause updates").check()
        page.wait_for_timeout(50)
        before = len(server.paths)  # type: ignore[attr-defined]
        page.wait_for_timeout(1200)
        assert len(server.paths) == before  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        page.get_by_label("Pause updates").uncheck()
        page.get_by_text("the numbers below are old").wait_for()
        assert page.get_by_role("heading", name="rolling out version 3").is_visible()


def test_the_state_is_plain_json(office: dict[str, Any]) -> None:
    status, headers, body = office["service"].handle("GET", "/operate/state", {"host": "127.0.0.1", "authorization": f"Bearer {office['bob']}"})
    found = json.loads(body)
    assert status == 200 and dict(headers)["content-type"] == "application/json"
    assert set(found) == {"problem", "subject", "rollout", "plan", "log", "traffic", "minutes", "tests", "events", "at", "reader", "actions"}
