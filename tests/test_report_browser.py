"""The page in a real browser: it sorts, filters, shows and plays, and asks nobody for anything."""

import json
import shutil
from pathlib import Path

import pytest
from mediafiles import sine, write_video, write_wav
from PIL import Image
from test_report_page import CONFIG, EVIL, write

from vlm_grpo import report
from vlm_grpo.media import Medium
from vlm_grpo.report import MediaFolder

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip(f"no {'Chromium' if found is None else 'chromedriver'} on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three prompts of four completions: a picture, a clip and a sound, kept as a run keeps them."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(model="org/model"))
    picture, clip, sound = (folder.parent / name for name in ("a.png", "b.mp4", "c.wav"))
    Image.effect_noise((400, 300), 60).save(picture)
    write_video(clip, 12, fps=6)
    write_wav(sound, sine(16000))
    media = [Medium.of(picture), Medium.of(clip, "video"), Medium.of(sound, "audio")]
    keeper = MediaFolder(folder)
    keeper.begin(1.0)
    kept = keeper.keep([[medium] for medium in media])
    samples = [
        {
            "step": group + 1,
            "prompt": f"[{media[group].label}] what is this ?",
            "completion": EVIL if row == 0 else f"answer {group}.{row}",
            "rewards": {"accuracy": [0.5, 10.0, None, 9.0][row] if group else row - 2.0},
            "advantage": 0.0,
            "media": [media[group].label],
            "media_files": kept[group],
        }
        for group in range(3)
        for row in range(4)
    ]
    write(folder / "samples.jsonl", samples)
    write(folder / "metrics.jsonl", [{"step": step, "reward": step / 9, "kl": 0.1} for step in range(1, 9)])
    return folder


@pytest.fixture(scope="module")
def page(browser, run):
    browser.get_log("performance")
    browser.get(report.write_report(run).as_uri())
    return browser


def shown(page, title: str) -> list[str]:
    """The cells of a column, of the lines that can be seen, from top to bottom."""
    return page.execute_script(
        """return [...document.querySelectorAll(`#samples-table td[data-title="${arguments[0]}"]`)]
        .filter((cell) => cell.offsetParent !== null).map((cell) => cell.innerText.trim())""",
        title,
    )


def heading(page, title: str):
    from selenium.webdriver.common.by import By

    buttons = page.find_elements(By.CSS_SELECTOR, "#samples-table th button")
    return next(button for button in buttons if button.text.strip().startswith(title))


def test_a_click_sorts_both_ways_and_keeps_what_is_equal_in_order(page):  # covers Q9
    before = shown(page, "accuracy")
    assert before == ["-2", "-1", "0", "1", "0.5", "10", "–", "9", "0.5", "10", "–", "9"]
    heading(page, "accuracy").click()
    assert shown(page, "accuracy") == ["-2", "-1", "0", "0.5", "0.5", "1", "9", "9", "10", "10", "–", "–"]
    assert shown(page, "step")[-6:] == ["2", "3", "2", "3", "2", "3"], "equal ones stay in order"
    heading(page, "accuracy").click()
    assert shown(page, "accuracy") == ["10", "10", "9", "9", "1", "0.5", "0.5", "0", "-1", "-2", "–", "–"]
    assert shown(page, "step")[:4] == ["2", "3", "2", "3"]


def test_the_keyboard_sorts_too_and_is_told_how(page):
    from selenium.webdriver.common.keys import Keys

    heading(page, "step").send_keys(Keys.ENTER)
    assert shown(page, "step") == [str(group) for group in (1, 2, 3) for _ in range(4)]
    heading(page, "step").send_keys(Keys.SPACE)
    assert shown(page, "step")[0] == "3"
    states = page.execute_script("return [...document.querySelectorAll('th[aria-sort]')].map((h) => h.ariaSort)")
    assert states == ["descending"]


def test_the_filter_keeps_lines_with_all_words(page):
    from selenium.webdriver.common.by import By

    field = page.find_element(By.CSS_SELECTOR, '[data-filters="samples"]')
    field.send_keys("ANSWER what 1.")
    assert sorted(shown(page, "completion")) == ["answer 1.1", "answer 1.2", "answer 1.3"]
    assert page.find_element(By.CSS_SELECTOR, '[data-counts="samples"]').text == "3 of 12 lines"
    for _ in range(20):
        field.send_keys("\b")
    assert len(shown(page, "step")) == 12


def test_pictures_show_and_clips_and_sounds_play(page):
    heading(page, "accuracy").click()  # groups fall apart: every line shows its own
    from selenium.webdriver.support.ui import WebDriverWait

    ready = """return [...document.querySelectorAll("#samples-table tr:not(.again) :is(img, video, audio)")]
      .map((m) => [m.tagName, ...(m.tagName === "IMG" ? [m.naturalWidth, m.offsetWidth] : [m.duration, m.readyState]),
      ])"""
    WebDriverWait(page, 20).until(lambda page: all(found[1] and found[2] for found in page.execute_script(ready)))
    found = page.execute_script(ready)
    assert {tag for tag, *_ in found} == {"IMG", "VIDEO", "AUDIO"} and len(found) >= 6
    for tag, *sizes in found:
        if tag == "IMG":
            assert sizes[0] == 256 and sizes[1] >= 100
        else:
            assert sizes[0] == pytest.approx({"VIDEO": 2.0, "AUDIO": 1.0}[tag], abs=0.1) and sizes[1] >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_is_wider_than_its_window_and_the_dark_one_is_dark(page, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in colour[4:-1].split(",")) / 3
    assert light > 200 if scheme == "light" else light < 50
    line = page.execute_script("return getComputedStyle(document.querySelector('svg path[style*=hue-0]')).stroke")
    assert line == {"light": "rgb(37, 99, 201)", "dark": "rgb(122, 167, 247)"}[scheme]
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_complains_and_nobody_is_asked(page):
    page.execute_script("console.log('the log is read')")
    said = [entry["message"] for entry in page.get_log("browser")]
    assert len(said) == 1 and "the log is read" in said[0], said
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert page.execute_script("return document.querySelectorAll('script').length") == 1


def test_without_scripts_there_is_a_plain_table(browser, run):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((run / "report.html").as_uri())
        assert shown(browser, "completion")[1] == "answer 0.1" and len(shown(browser, "step")) == 12
        names = "return [...document.querySelectorAll('#samples-table img')].map((i) => i.naturalWidth)"
        assert browser.execute_script(names)[0] == 256
        assert browser.execute_script("return document.querySelector('.tools').offsetParent") is None
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
