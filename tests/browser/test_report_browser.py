"""The report's page in a real Chromium. Run with `make test-browser`; Debian: apt-get install chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium
from report_kit import HOSTILE, write_run, write_study

from pgpo.cli import main

pytestmark = pytest.mark.browser

PHONE = 360  # px


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.fail("these tests need Chromium; on Debian: apt-get install chromium")
    with Chromium(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """runs: two runs with hostile samples; study: two settings; big: 200 runs; many: one setting with ten methods."""
    folder = tmp_path_factory.mktemp("report")
    tokens = [["a", 0.02, -0.1, -0.3], ["<b>", 0.3, -2.0, -0.5], ["c", 0.6, -0.1, -5.0]]
    samples = [{"prompt": text, "completion": text, "reward": 0.0} for text in HOSTILE]
    coloured = {"prompt": "p", "completion": "a <b> c " + "long " * 300, "reward": 1.0, "tokens": tokens}
    names = ("pgpo", "sdpo")
    runs = [write_run(folder / name, name, falls=name == "sdpo", samples=[coloured, *samples[:3]]) for name in names]
    (runs[0] / "alarms.jsonl").write_text('{"step": 9, "signal": "grad_norm", "action": "warn"}\n')
    studies = {
        "study": write_study(folder / "study"),
        "big": write_study(folder / "big", [f"setting-{i}" for i in range(5)], steps=200),
        "many": write_study(folder / "many", ("plain",), [f"a-rather-long-method-{i}" for i in range(10)], (0, 1), 50),
    }
    found = {"runs": folder / "runs.html"}
    assert main(["report", *map(str, runs), "--out", str(found["runs"])]) == 0
    for name, study in studies.items():
        found[name] = folder / f"{name}.html"
        assert main(["report", str(study), "--out", str(found[name])]) == 0
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 768, 1280])
@pytest.mark.parametrize("name", ["runs", "study", "many"])
def test_the_page_fits_is_quiet_and_asks_no_network(
    browser: Chromium, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    assert browser.problems() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None
    wraps = "[...document.querySelectorAll('.prompt, .completion')].every((p) => p.scrollWidth <= p.clientWidth + 1)"
    assert browser.run(wraps)
    # Of the three sizes of the main chart one is shown, and its text is large enough to read.
    shown = browser.run(
        "[...document.querySelectorAll('.hero')].map((h) => [...h.children].filter((d) => d.offsetWidth > 0).length)"
    )
    assert shown and set(shown) == {1}
    size = """Math.min(...[...document.querySelectorAll('figure svg text')]
      .filter((t) => t.getBoundingClientRect().width > 0)
      .map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"""
    assert browser.run(size) >= 9.0  # px
    assert browser.run("document.querySelectorAll('.table table').length") >= 3


def test_the_dark_page_is_dark_and_the_light_one_light(browser: Chromium, pages: dict[str, Path]) -> None:
    # Contrast of WCAG 2.1 between text and paper, from the colours that the browser computed.
    contrast = """(() => {
      const light = (text) => {
        const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const [r, g, b] = text.match(/[\\d.]+/g).map((v) => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      const against = (text) => ratio(light(text), paper);
      const colors = [document.body, document.querySelector('.note'), document.querySelector('.flag')];
      const lines = [...document.querySelectorAll('.m .line')].map((line) => against(getComputedStyle(line).stroke));
      return [paper, Math.min(...colors.map((e) => against(getComputedStyle(e).color))), Math.min(...lines)];
    })()"""
    for dark in (False, True):
        browser.open(pages["runs"], dark=dark)
        paper, text, lines = browser.run(contrast)
        assert paper < 0.05 if dark else paper > 0.9
        assert text >= 4.5 and lines >= 3


def test_everything_is_there_without_a_script(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["study"], script=False)
    assert browser.problems() == []
    browser.send("DOM.enable")
    root = browser.send("DOM.getDocument")["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(browser.send("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    assert count("svg[data-chart] .line") > 50 and count("tbody tr") > 20
    assert count("svg[tabindex]") == 0  # the script did not run


def test_a_box_of_the_legend_hides_its_method_in_its_section_alone(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["study"])
    visible = (
        "[...document.querySelectorAll('#study-1-{0} svg[data-chart] [data-m=\"0\"]')]"
        ".filter((g) => getComputedStyle(g).display !== 'none').length"
    )
    here, there = (browser.run(visible.format(i)) for i in (0, 1))
    assert here > 0
    browser.run("document.querySelector('#study-1-0 .legend input[value=\"0\"]').click()")
    assert [browser.run(visible.format(i)) for i in (0, 1)] == [0, there]
    assert (
        browser.run("getComputedStyle(document.querySelector('#study-1-0 .legend label')).textDecorationLine") != "none"
    )


def test_the_pointer_and_the_arrow_keys_read_a_chart(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["runs"])
    chart = "[...document.querySelectorAll('svg[data-chart=\"runs-rho\"]')][0]"
    browser.run(f"{chart}.scrollIntoView({{block: 'center'}})")
    x, y, width = browser.run(f"(({{x, y, width}}) => [x, y, width])({chart}.getBoundingClientRect())")
    browser.run("new Promise((done) => setTimeout(done, 200))")  # scrolling has hidden what was there
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * 0.5, y=y + 80)
    text = browser.run("document.querySelector('.tip.on').innerText")
    assert text.startswith("step ") and "PGPO α = 1" in text and "SDPO" in text
    assert browser.run("document.querySelectorAll('#runs .cursor.on').length") > 5  # the same step in every chart
    browser.run("document.querySelector('#runs .legend input[value=\"1\"]').click()")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * 0.4, y=y + 80)
    assert "SDPO" not in browser.run("document.querySelector('.tip.on').innerText")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    browser.run(f"{chart}.focus({{preventScroll: true}})")
    browser.key("End")
    assert browser.run("document.querySelector('.tip.on').innerText").startswith("step 40")
    browser.key("ArrowLeft")
    assert browser.run("document.querySelector('.tip.on').innerText").startswith("step 39")
    # The line stands at that step: step 40 is the right end of the frame.
    place = browser.run(f"{chart}.querySelector('.cursor').x1.baseVal.value")
    left, right, low, high = browser.run(f"{chart}.dataset.frame.split(' ').map(Number)")
    assert place == pytest.approx(left + (39 - low) / (high - low) * (right - left))
    browser.key("Escape")
    assert browser.run("document.querySelector('.tip.on')") is None


def test_tokens_are_reached_by_keyboard_and_tell_their_numbers(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["runs"], width=PHONE, height=740)
    token = "document.querySelector('.completion .tok')"
    assert browser.run(f"{token}.tabIndex") == 0
    assert browser.run(
        "[...document.querySelector('.completion').querySelectorAll('.tok')].map((t) => t.tabIndex)"
    ) == [*(0, -1, -1)]
    browser.run(f"{token}.focus()")
    browser.run("new Promise((done) => setTimeout(done, 300))")
    browser.key("ArrowRight")
    text = browser.run("document.querySelector('.tip.on').innerText")
    assert text == "“<b>”: divergence 0.3 nats; student 13.5 % (log p −2.00), teacher 60.7 % (log p −0.50)"
    left, right = browser.run(
        "(({left, right}) => [left, right])(document.querySelector('.tip').getBoundingClientRect())"
    )
    assert left >= 0 and right <= PHONE
    assert browser.run("document.activeElement.textContent") == "<b>"


def test_a_study_of_200_runs_opens_within_two_seconds(browser: Chromium, pages: dict[str, Path]) -> None:
    """By the clock of the page: from the navigation to the end of the load event, the best of three."""
    milliseconds = []
    for _ in range(3):
        browser.open(pages["big"])
        milliseconds.append(browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert browser.problems() == []
    assert 0 < min(milliseconds) < 2000
