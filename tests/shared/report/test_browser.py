"""The page in a real browser: wide and narrow, light and dark, and on paper."""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

WIDTHS = (1280, 768, 390, 320)
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Frames of other widths than a window can have; each says what of it does not fit.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const page = %s, widths = %s, found = [];
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = "0";
  frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const scrolls = (e) => e.closest(".scroll") && !e.matches(".scroll");
    const wide = [...inside.body.querySelectorAll("*")].filter((e) =>
      !scrolls(e) && e.getBoundingClientRect().right > width + 1);
    const texts = [...inside.querySelectorAll("svg[role=img] text")].map((e) =>
      e.getBoundingClientRect().height);
    const view = frame.contentWindow;
    found.push({
      width, scroll: root.scrollWidth, wide: wide.map((e) => e.tagName + "." + e.className),
      text: Math.min(...texts), figures: inside.querySelectorAll("figure").length,
      loaded: view.performance.getEntriesByType("resource").length,
      paper: view.getComputedStyle(inside.body).backgroundColor,
      ink: view.getComputedStyle(inside.body).color,
    });
    if (found.length === widths.length) {
      const said = document.createElement("pre");
      said.id = "found"; said.textContent = JSON.stringify(found);
      document.body.replaceChildren(said);
    }
  };
  document.body.append(frame);
}
</script></body>"""

Look = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def look(chromium: str, tmp_path: Path) -> Look:
    """Runs the browser without a window; its profile is the test's own."""

    def run(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        return subprocess.run(
            [*command, profile, "--no-first-run", *options, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return run


@pytest.fixture
def page(audited_run: Path, render: Callable[..., str], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render(audited_run, agreement=audited_run / "agreement.json"))
    return path


def measured(look: Look, page: Path, scheme: str) -> list[dict[str, object]]:
    # The policy forbids scripts, ours that measures too.
    inner = json.dumps(POLICY.sub("", page.read_text())).replace("</", "<\\/")
    wrapper = page.with_name("measure.html")
    wrapper.write_text(MEASURE % (inner, json.dumps(WIDTHS)))
    done = look(wrapper, scheme, "--virtual-time-budget=10000", "--dump-dom")
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert said, done.stdout[-2000:]
    found: list[dict[str, object]] = json.loads(html.unescape(said[1]))
    return sorted(found, key=lambda one: -int(str(one["width"])))


def brightness(colour: object) -> float:
    red, green, blue = map(int, re.findall(r"\d+", str(colour))[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_nothing_is_cut_off_at_any_width_and_nothing_is_loaded(
    look: Look, page: Path, scheme: str
) -> None:
    found = measured(look, page, scheme)
    assert [one["width"] for one in found] == list(WIDTHS)
    for one in found:
        assert one["scroll"] == one["width"], one
        assert one["wide"] == [], one
        assert one["loaded"] == 0
        assert one["figures"] == 5
        assert float(str(one["text"])) >= 9, "labels of charts can be read on a phone"
        paper, ink = brightness(one["paper"]), brightness(one["ink"])
        assert (paper > 0.9 and ink < 0.2) if scheme == LIGHT else (paper < 0.15 and ink > 0.8)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_screen_is_painted_in_the_readers_scheme(look: Look, page: Path, scheme: str) -> None:
    picture = page.with_name("screen.png")
    look(page, scheme, "--window-size=1280,2000", f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size[0] == 1280
        greys = list(image.convert("L").resize((64, 100)).get_flattened_data())
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert (sum(greys) / len(greys) > 200) == (scheme == LIGHT)
    assert colours
    assert len(colours) > 50, "more than an empty page"


def test_it_prints_on_a_few_pages(look: Look, page: Path) -> None:
    target = page.with_name("report.pdf")
    look(page, DARK, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 9
