"""The page of results in a real browser: filters, orders, keys, masks, videos, ten thousand images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browsers import canvas, chromium, faults, press, settle, visit
from made_results import (
    CLASSES,
    SOURCE,
    best_pixel,
    found_in,
    images_where,
    write_many,
    write_results,
)
from numpy.typing import NDArray

from comask.result_page import ResultPage
from comask.structures import Detections

pytestmark = pytest.mark.slow

ESCAPE, ENTER, LEFT, RIGHT, DOWN = "\ue00c", "\ue007", "\ue012", "\ue014", "\ue015"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def page(browser: Any, results: Path) -> Iterator[Any]:
    """The page of `write_results`, which is sound when a test ends as well."""
    visit(browser, results)
    yield browser
    assert not faults(browser, results.parent)


def choose(driver: Any, control: str, value: object) -> None:
    """Sets a control as a user would, and lets the page know."""
    driver.execute_script(
        "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('input', {bubbles: true}));"
        "one.dispatchEvent(new Event('change', {bubbles: true}));",
        control, str(value),
    )  # fmt: skip
    settle(driver)


def shown(driver: Any) -> list[str]:
    """The names on the cards, in order."""
    return driver.execute_script(
        "return [...document.querySelectorAll('.card')].sort((a, b) => a.id.slice(5) - b.id.slice(5))"
        ".map((card) => card.querySelector('.name').title)"
    )


def texts(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


def indices(names: list[str]) -> list[int]:
    """Returns the indices of the images; videos among the names are left out."""
    return [
        int(name.removeprefix("photos/").removesuffix(".png")) if "photos" in name else 1
        for name in names
        if "clip" not in name and "rtsp" not in name
    ]


def test_it_shows_all_and_escapes_names(page: Any) -> None:
    names = shown(page)
    assert len(names) == 14
    assert indices(names) == list(range(12))
    assert names[1].startswith("<img src=x onerror=alert(1)>")
    assert "bundle <img src=x" in page.find_element("id", "facts").text
    assert "backend torch:fp32" in page.find_element("id", "facts").text
    assert "ended early" in page.find_element("id", "early").text
    page.find_element("css selector", "#failures summary").click()
    assert len(texts(page, "#failures li")) == 3
    assert texts(page, "#failures li")[0].endswith(": empty")
    assert not page.execute_script("return document.querySelectorAll('[onerror]').length")
    many = [int((found_in(index).scores >= 0.5).sum()) for index in range(12)]
    counts = texts(page, ".card .note")
    assert counts[:12] == [f"{n} instance" + "s" * (n != 1) for n in many]
    assert counts[12:] == ["video, 0:01"] * 2


# A score that is smaller in 32 bits than as written, and yet reaches a threshold that is written so.
EXACT = next(
    score
    for score in (round(float(score), 2) for i in range(12) for score in found_in(i).scores)
    if float(np.float32(score)) < score
)


@pytest.mark.parametrize("score", [0.0, EXACT, 0.9])
def test_filters_choose_what_they_say(page: Any, score: float) -> None:
    choose(page, "score", score)
    limit = np.float32(score)
    total = sum(int((found_in(index).scores >= limit).sum()) for index in (*range(12), 0, 0))
    assert page.find_element("id", "count").text == f"14 shown, {total} instances"
    choose(page, "which", "with")
    expected = images_where(lambda found: found.scores >= limit)
    assert indices(shown(page)) == expected
    choose(page, "which", "without")
    assert indices(shown(page)) == [index for index in range(12) if index not in expected]
    choose(page, "which", "all")
    for name, low, high in (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, 1e9)):
        choose(page, "area", name)
        assert page.find_element("id", "which").get_property("value") == "with"

        def fits(found: Detections, low: float = low, high: float = high) -> NDArray[np.bool_]:
            areas = found.masks.sum(axis=(1, 2))
            return (found.scores >= limit) & (areas >= low) & (areas < high)

        assert indices(shown(page)) == images_where(fits)
    choose(page, "area", "")
    assert len(shown(page)) == 14


def test_classes_and_names_filter(page: Any) -> None:
    choose(page, "score", 0)
    page.find_element("css selector", "#classes > button").click()
    counts = [int(text) for text in texts(page, "#class-list li .note")]
    labels = np.concatenate([found_in(index).labels for index in (*range(12), 0, 0)])
    assert counts == np.bincount(labels, minlength=len(CLASSES)).tolist()
    page.find_element("id", "no-class").click()
    settle(page)
    assert shown(page) == []
    assert page.find_element("id", "count").text == "0 of 14 shown, 0 instances"
    page.find_elements("css selector", "#class-list input")[2].click()
    settle(page)
    assert texts(page, "#classes > button") == [CLASSES[2]]
    assert indices(shown(page)) == images_where(lambda found: found.labels == 2)
    in_video = any((found_in(index).labels == 2).any() for index in range(5))
    assert any("rtsp" in name for name in shown(page)) == in_video
    page.find_element("id", "every-class").click()
    settle(page)
    assert len(shown(page)) == 14
    page.find_element("tag name", "body").send_keys(ESCAPE)
    assert not page.find_element("id", "class-list").is_displayed()
    page.find_element("tag name", "body").send_keys("/")
    press(page, "PHOTOS/1")
    assert indices(shown(page)) == [10, 11]
    choose(page, "text", "onerror=")
    assert indices(shown(page)) == [1]
    choose(page, "text", "nothing has this name")
    assert shown(page) == []


def test_orders(page: Any) -> None:
    choose(page, "score", 0)
    found = [found_in(index) for index in range(12)]
    areas = [one.masks.sum(axis=(1, 2)).max(initial=0) for one in found]
    for order, key in (
        ("most", [-len(one) for one in found]),
        ("best", [-one.scores.max(initial=0) for one in found]),
        ("worst", [one.scores.min(initial=2) for one in found]),
        ("largest", [-area for area in areas]),
        ("run", list(range(12))),
    ):
        choose(page, "sort", order)
        assert indices(shown(page)) == sorted(range(12), key=lambda i, key=key: (key[i], i)), order
    choose(page, "sort", "name")
    names = [name for name in shown(page) if "photos" in name]
    assert indices(names) == sorted(indices(names))  # 2 before 10


def test_masks_are_drawn_where_they_are(page: Any) -> None:
    """Each instance alone, at the picture's own size, against the mask's pixels."""
    choose(page, "score", 0)
    index = max(range(12), key=lambda i: len(found_in(i)))
    found = found_in(index)
    page.find_element("id", f"card-{index}").click()
    settle(page)
    for button in ("zoom", "masks"):
        page.find_element("id", button).click()
    settle(page)
    assert not canvas(page, "#stage canvas").any()
    for number in range(len(found)):
        press(page, DOWN)
        rows = page.find_elements("css selector", "#view tbody tr")
        over = [row.get_attribute("class") == "over" for row in rows]
        assert over == [row == number for row in range(len(found))]
        drawn = canvas(page, "#stage canvas")[..., 3] > 100
        assert drawn.shape == found.image_size
        mask = found.masks[number].astype(np.uint8)
        assert drawn[cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(bool)].all()
        x1, y1, x2, y2 = found.boxes_xyxy[number].round().astype(int)
        box = np.zeros_like(drawn)  # its lines, which are drawn as well
        box[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3] = True
        box[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = False
        assert not drawn[~(box | cv2.dilate(mask, np.ones((5, 5), np.uint8)).astype(bool))].any()


def test_the_view_lists_instances_and_follows_keys_and_pointer(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    some = [i for i in range(12) if found_in(i).scores.min(initial=1) < 0.5]
    index = max(some, key=lambda i: int((found_in(i).scores >= 0.5).sum()))
    found = found_in(index)
    kept = found[found.scores >= 0.5]
    assert len(kept)
    page.find_element("id", "grid").send_keys(RIGHT * (index + 1))
    press(page, ENTER)
    assert page.find_element("id", "view-name").text == shown(page)[index]
    height, width = found.image_size
    place = page.find_element("id", "view-place").text
    assert place == f"{index + 1} of 14, {width} \N{MULTIPLICATION SIGN} {height} pixels"
    rows = page.find_elements("css selector", "#view tbody tr")
    areas = kept.masks.sum(axis=(1, 2))
    boxes = kept.boxes_xyxy.round().astype(int)
    assert [row[1:] for row in rows_of(page)] == [
        [f"{score:.3f}", f"{area:,}", ", ".join(map(str, box))]
        for score, area, box in zip(kept.scores, areas, boxes.tolist(), strict=True)
    ]
    assert f"{len(kept)} of {len(found)} inst" in page.find_element("id", "view-note").text
    before = canvas(page, "#stage canvas")
    assert before.any()
    ActionChains(page).move_to_element(rows[-1]).perform()
    settle(page)
    assert "over" in rows[-1].get_attribute("class")
    assert (canvas(page, "#stage canvas") != before).any()
    # the pointer over a mask points out its row
    x, y = best_pixel(kept.masks[0])
    stage = page.find_element("css selector", "#stage canvas")
    right = round(((x + 0.5) / width - 0.5) * stage.size["width"])
    down = round(((y + 0.5) / height - 0.5) * stage.size["height"])
    ActionChains(page).move_to_element_with_offset(stage, right, down).perform()
    settle(page)
    assert "over" in rows[0].get_attribute("class")
    press(page, RIGHT)
    assert f"{index + 2} of 14" in page.find_element("id", "view-place").text
    press(page, LEFT + ESCAPE)
    assert not page.find_element("id", "view").is_displayed()
    chosen = page.find_element("css selector", ".card[aria-selected=true]")
    assert chosen.get_attribute("id") == f"card-{index}"
    assert page.switch_to.active_element.get_attribute("id") == "grid"


def test_videos_have_timelines_that_follow_filters_and_move_the_film(page: Any) -> None:
    choose(page, "score", 0.3)
    page.find_element("id", "card-12").click()
    settle(page)
    labels = np.concatenate(
        [found_in(i // 10).labels[found_in(i // 10).scores >= np.float32(0.3)] for i in range(50)]
    )
    counts = sorted(np.bincount(labels, minlength=len(CLASSES)).tolist(), reverse=True)
    told = [int(row[1]) for row in rows_of(page)]
    assert told == [count for count in counts if count]
    assert "50 frames" in page.find_element("id", "view-note").text
    bars = canvas(page, "#timeline canvas")[..., 3] > 0
    heights = bars.sum(axis=0)
    parts = heights[np.linspace(0, len(heights), 50, endpoint=False, dtype=int) + 3]
    true = np.array([(found_in(i // 10).scores >= np.float32(0.3)).sum() for i in range(50)])
    np.testing.assert_allclose(parts / bars.shape[0], true / true.max(), atol=0.03)
    duration = "return document.querySelector('#stage video').duration"
    assert page.execute_script(duration) == pytest.approx(2.0, abs=0.1)
    page.execute_script(
        "const one = document.querySelector('#timeline canvas'), box = one.getBoundingClientRect();"
        "const at = {clientX: box.left + 0.5 * box.width, clientY: box.top + 5};"
        "one.dispatchEvent(new PointerEvent('pointermove', at));"
        "one.dispatchEvent(new MouseEvent('click', at))"
    )
    settle(page)
    time = page.execute_script("return document.querySelector('#stage video').currentTime")
    assert time == pytest.approx(1.0, abs=0.08)
    assert "1 frames" in page.find_element("css selector", "#timeline p").text
    press(page, RIGHT)
    assert page.find_elements("css selector", "#stage video") == []
    assert "no overlay was saved" in page.find_element("id", "view-note").text
    assert canvas(page, "#stage canvas").any()
    press(page, ESCAPE)


def rows_of(driver: Any) -> list[list[str]]:
    return [
        [cell.text for cell in row.find_elements("tag name", "td")]
        for row in driver.find_elements("css selector", "#view tbody tr")
    ]


@pytest.mark.parametrize("width", [1400, 700, 360])
def test_the_view_fits_the_window(browser: Any, results: Path, width: int) -> None:
    visit(browser, results, width=width, height=700, dark=width == 700)
    for place in (0, 12, 13):
        browser.execute_script(f"scrollTo(0, {place and 'document.body.scrollHeight'})")
        settle(browser)
        browser.execute_script(f"document.getElementById('card-{place}').click()")
        settle(browser)
        for name in ("#stage", "#close", "aside"):
            box = browser.execute_script(
                "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", name
            )
            assert min(box["left"], box["top"]) >= 0
            assert box["right"] <= width
            assert box["bottom"] <= 700
        press(browser, ESCAPE)
    assert not faults(browser, results.parent)


def test_each_class_may_have_its_own_threshold(browser: Any, tmp_path: Path) -> None:
    limits = tuple(np.linspace(0.1, 0.9, len(CLASSES)).tolist())
    page = ResultPage(tmp_path)
    page.start(CLASSES, limits)
    for index in range(12):
        page.add(page.write_image(page.number(), f"{index}", SOURCE.image(index), found_in(index)))
    path = page.finish([])
    visit(browser, path)

    def count(limits: Any) -> int:
        each = np.broadcast_to(np.array(limits, np.float32), len(CLASSES))
        return sum(int((f.scores >= each[f.labels]).sum()) for f in map(found_in, range(12)))

    assert count(limits) != count(0.5)
    told = browser.find_element("id", "count")
    assert told.text == f"12 shown, {count(limits)} instances"
    choose(browser, "score", 0.2)
    assert told.text == f"12 shown, {count(0.2)} instances"
    browser.find_element("css selector", "#own input").click()
    settle(browser)
    assert told.text == f"12 shown, {count(limits)} instances"
    assert not faults(browser, tmp_path)


def test_ten_thousand_images_open_at_once_and_scroll(browser: Any, tmp_path: Path) -> None:
    path = write_many(tmp_path, 10_000)
    visit(browser, path)
    milliseconds = browser.execute_script(
        "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    )
    assert browser.find_element("id", "count").text.startswith("10,000 shown, ")
    assert milliseconds < 2000
    settle(browser)
    cards = "return document.querySelectorAll('.card').length"
    assert 0 < browser.execute_script(cards) < 100
    frames, most = browser.execute_async_script(
        """
        const done = arguments[0], times = [];
        let last = performance.now(), most = 0, y = 0;
        const step = (now) => {
          times.push(now - last);
          last = now;
          most = Math.max(most, document.querySelectorAll(".card").length);
          scrollTo(0, y += 250);
          if (times.length < 100) requestAnimationFrame(step);
          else done([times.sort((a, b) => a - b), most]);
        };
        requestAnimationFrame(step);
        """
    )
    assert frames[50] < 150  # milliseconds a frame on a busy machine without a GPU
    assert most < 150
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    settle(browser)
    names = shown(browser)
    assert names[-1] == "photos/09999.jpg"
    assert len(names) < 100
    last = browser.find_element("id", "card-9999")
    assert last.find_element("tag name", "img").get_property("naturalWidth") > 0
    loaded = json.dumps(browser.get_log("performance")).count("thumb.jpg")
    assert loaded < 3000  # by far not all
    choose(browser, "text", "0777")
    assert shown(browser) == ["photos/00777.jpg", *(f"photos/0777{i}.jpg" for i in range(10))]
    assert browser.execute_script("return scrollY") < 200
    assert not faults(browser, tmp_path)


@pytest.mark.parametrize("width", [1400, 360])
def test_the_list_of_classes_lies_above_the_pictures(
    browser: Any, results: Path, width: int
) -> None:
    visit(browser, results, width=width)
    browser.find_element("css selector", "#classes > button").click()
    settle(browser)
    hidden = browser.execute_script(
        """
        return [...document.querySelectorAll("#class-list li")].filter((item) => {
          const box = item.getBoundingClientRect();
          return !item.contains(document.elementFromPoint(box.left + 20, box.top + box.height / 2));
        }).length
        """
    )
    assert not hidden
    assert not faults(browser, results.parent)
