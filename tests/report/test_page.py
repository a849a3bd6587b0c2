"""The page of a report, opened and used in headless Chromium where there is one."""

import base64
import copy
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from msfp_cli.errors import UsageError
from msfp_cli.report.page import render
from msfp_cli.report.plots import draw_plots

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

MODELS = {
    "full": "full precision",
    "signed": "signed FP4",
    "calibrated": "MSFP",
    "export": "MSFP, fine-tuned",
}
HOSTILE = "</script><script>document.title = 'broken'</script>"
SECTIONS = (
    "Pictures",
    "Figures",
    "Error by timestep",
    "Router",
    "Layers",
    "Size and speed",
    "Reproduce",
)


def picture(shade: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 90, 160)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def layer(i: int) -> dict[str, Any]:
    formats = ("e2m1", "ue2m2", "ue1m3")
    return {
        "name": f"blocks.{i // 10}.layer{i % 10}",
        "kind": "linear",
        "reason": "lifted" if i % 7 == 0 else "default",
        "weight_format": "e2m1",
        "input_format": formats[i % 3],
        "signed": i % 3 == 0,
        "weight_error": 0.01 + i / 1e4,
        "input_error": 0.02 - i / 2e4,
        "sensitivity": None if i == 3 else i * 1e-5,
        "output_error": 0.01 * (1 + i % 5),
        "share": 1 / 120,
        "candidates": [
            {"format": name, "error": 0.01 * k + 0.01, "max_value": 1.0, "zero_point": None}
            for k, name in enumerate(formats)
        ],
        "histogram": {"minimum": -1.0, "maximum": 3.0, "counts": [1, 50, 9, 0, 3]},
        "grid": [k / 4 for k in range(-3, 13)],
    }


def document() -> dict[str, Any]:
    """Return a document that has everything: 120 layers, 20 timesteps, 4 models, 3 pictures."""
    times = [951.0 - 50 * j for j in range(20)]
    return {
        "title": "msfp report",
        "model": "a/model",
        "version": "0.1.0",
        "summary": "120 layers quantized.",
        "headline": [{"label": "PSNR", "value": "31.0 dB", "note": "same seeds"}],
        "models": [{"key": key, "title": title} for key, title in MODELS.items()],
        "pictures": [
            {
                "prompt": HOSTILE if i == 1 else f"prompt {i}",
                "seed": i,
                "images": {key: picture(60 * j) for j, key in enumerate(MODELS)},
                "psnr": {key: 20.0 + j for j, key in enumerate(MODELS) if j},
            }
            for i in range(3)
        ],
        "comparison": {
            "columns": [{"key": "psnr", "title": "PSNR, dB", "digits": 2, "better": "higher"}],
            "rows": [
                {"title": t, "values": {"psnr": None if k == "full" else 20.0}}
                for k, t in MODELS.items()
            ],
        },
        "components": {
            "unet": {
                "timesteps": {
                    "series": [{"key": "export", "title": "MSFP, fine-tuned"}],
                    "rows": [
                        {"timestep": t, "values": {"export": 1e-3 + 1 / (t + 1)}} for t in times
                    ],
                },
                "layers": [layer(i) for i in range(120)],
                "router": {
                    "timesteps": times,
                    "hub_size": 2,
                    "rows": [
                        {"name": f"layer{i}", "members": [0] * (20 - i) + [1] * i}
                        for i in range(12)
                    ],
                },
            }
        },
        "costs": [
            {
                "title": t,
                "denoiser_bytes": 10_000_000,
                "seconds_per_picture": 0.5,
                "peak_memory_bytes": None,
            }
            for t in MODELS.values()
        ],
        "commands": ["msfp calibrate a/model"],
        "settings": [{"title": "calibration", "rows": [["weights", "4"]]}],
        "notes": ["too few pictures"],
    }


def test_the_document_in_the_page_is_the_one_given() -> None:
    page = render(document())
    inside = page.split('<script type="application/json" id="document">')[1].split("</script>")[0]
    assert json.loads(inside) == document()
    assert HOSTILE not in page
    assert page.count("<script") == 2


def test_the_page_names_nothing_to_fetch() -> None:
    page = render(document())
    assert "default-src 'none'" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "https://" not in page and "@import" not in page and "url(" not in page


def test_plots_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = draw_plots(document(), tmp_path)
    assert {path.name for path in paths} == {
        "sizes.png",
        "unet-timesteps.png",
        "unet-layers.png",
        "unet-router.png",
    }
    for path in paths:
        with Image.open(path) as plot:
            assert len(set(plot.convert("L").tobytes())) > 10, f"{path.name} is blank"
    weights_only = document()
    for layer_ in weights_only["components"]["unet"]["layers"]:
        layer_["signed"] = None
    assert len(draw_plots(weights_only, tmp_path)) == len(paths)
    few = document() | {"costs": []}
    few["components"]["unet"] |= {
        "router": None,
        "timesteps": {"series": [], "rows": []},
        "layers": [],
    }
    assert draw_plots(few, tmp_path) == []


def test_missing_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'msfp\[report\]'"):
        draw_plots(document(), tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator["Chrome"]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def open_page(browser: "Chrome", path: Path, data: dict[str, Any]) -> "Chrome":
    path.write_text(render(data), "utf-8")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before does not count
    browser.get(path.as_uri())
    return browser


def errors_in(browser: "Chrome") -> list[str]:
    return [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]


def requested(browser: "Chrome") -> set[str]:
    """Return every address that was asked for since the last look, embedded pictures aside."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return {address for address in asked if not address.startswith("data:")}


def find(browser: "Chrome", selector: str) -> list["WebElement"]:
    return browser.find_elements("css selector", selector)


def headings(browser: "Chrome") -> list[str]:
    return [heading.text for heading in find(browser, "h2")]


def test_page_opens_without_error_or_request(browser: "Chrome", tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    open_page(browser, page, document())
    assert headings(browser) == list(SECTIONS)
    assert browser.title == "msfp report: a/model"  # the hostile prompt did nothing
    assert HOSTILE in find(browser, "#pictures")[0].text
    assert all(
        browser.execute_script("return arguments[0].naturalWidth", image) == 32
        for image in find(browser, "img")
    )
    assert requested(browser) == {page.as_uri()}
    assert errors_in(browser) == []
    assert page.stat().st_size < 5_000_000


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_does_not_scroll_sideways(
    browser: "Chrome", tmp_path: Path, width: int, theme: str
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    open_page(browser, tmp_path / "report.html", document())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) < 128) is (theme == "dark")
    find(browser, "#theme")[0].click()
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor") != ground
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_table_sorts_filters_and_opens(browser: "Chrome", tmp_path: Path) -> None:
    open_page(browser, tmp_path / "report.html", document())

    def names() -> list[str]:
        return [
            row.get_attribute("data-layer") for row in find(browser, "table.layers tr[data-layer]")
        ]

    def click(element: "WebElement") -> None:
        browser.execute_script(
            "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element
        )

    layers = document()["components"]["unet"]["layers"]
    assert names() == [each["name"] for each in layers]
    known = [each for each in layers if each["sensitivity"] is not None]
    worst_first = [each["name"] for each in sorted(known, key=lambda each: -each["sensitivity"])]
    click(find(browser, "th[data-key=sensitivity] button")[0])
    assert names() == [*worst_first, "blocks.0.layer3"]  # what is not known comes last
    assert find(browser, "th[data-key=sensitivity]")[0].get_attribute("aria-sort") == "descending"
    click(find(browser, "th[data-key=sensitivity] button")[0])
    assert names() == [*worst_first[::-1], "blocks.0.layer3"]
    click(find(browser, "th[data-key=name] button")[0])
    assert names() == sorted(each["name"] for each in layers)

    find(browser, "input[type=search]")[0].send_keys("unsigned")
    assert set(names()) == {each["name"] for each in layers if not each["signed"]}
    find(browser, "input[type=search]")[0].clear()
    find(browser, "input[type=search]")[0].send_keys("blocks.11.layer9")
    assert names() == ["blocks.11.layer9"]
    click(find(browser, "button.open")[0])
    charts = [chart.get_attribute("aria-label") for chart in find(browser, "td.detail svg")]
    assert charts == [
        "relative squared error of every candidate",
        "histogram of the input, with the values of the chosen grid",
    ]
    assert (
        len(find(browser, "td.detail svg line")) == 16 + 1
    )  # the grid's values, and the ground line
    click(find(browser, "button.open")[0])
    assert find(browser, "td.detail") == []
    assert errors_in(browser) == []


def test_pictures_flip_and_slide(browser: "Chrome", tmp_path: Path) -> None:
    open_page(browser, tmp_path / "report.html", document())

    def shown() -> list[str]:
        return [image.get_attribute("data-key") for image in find(browser, "#pictures img")]

    assert shown() == list(MODELS) * 3
    find(browser, "#mode-flip")[0].click()
    assert shown() == ["export"] * 3
    find(browser, "#flip-signed")[0].click()
    assert shown() == ["signed"] * 3
    find(browser, "body")[0].send_keys("1")
    assert shown() == ["full"] * 3
    find(browser, "#mode-slider")[0].click()
    assert shown() == ["full", "export"] * 3
    browser.execute_script(
        "const slider = document.getElementById('slider');"
        "slider.value = 80; slider.dispatchEvent(new Event('input'))"
    )
    assert "80%" in find(browser, "#pictures img[data-key=export]")[0].get_attribute("style")
    find(browser, "#mode-side")[0].click()
    assert shown() == list(MODELS) * 3
    assert errors_in(browser) == []


MISSING = {
    "Pictures": {"pictures": []},
    "Figures": {"comparison": None},
    "Size and speed": {"costs": []},
    "Reproduce": {"commands": [], "settings": []},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_missing_has_no_section(section: str, browser: "Chrome", tmp_path: Path) -> None:
    data = copy.deepcopy(document()) | MISSING.get(section, {})
    part = data["components"]["unet"]
    part |= {
        "Error by timestep": {"timesteps": None},
        "Router": {"router": None},
        "Layers": {"layers": None},
    }.get(section, {})
    open_page(browser, tmp_path / "report.html", data)
    assert headings(browser) == [each for each in SECTIONS if each != section]
    assert errors_in(browser) == []
