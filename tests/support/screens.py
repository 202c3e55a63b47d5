"""Pages as a browser shows them, in headless Chromium."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)
DARK = "--blink-settings=preferredColorScheme=0"

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)"
)

# Each page lies in a frame of its own width, which media queries take for the screen.
LOOK = """
const lines = (cell) => {
  const page = cell.ownerDocument, walker = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const tops = new Set();
  while (walker.nextNode()) {
    const range = page.createRange();
    range.selectNode(walker.currentNode);
    for (const box of range.getClientRects()) tops.add(Math.round(box.top));
  }
  return tops.size;
};
const look = (page) => {
  const style = page.defaultView.getComputedStyle(page.body);
  const cells = [...page.querySelectorAll("td, th, dt, dd")];
  const words = (cell) => cell.innerText.trim().split(/\\s+/).length;
  return {
    width: page.documentElement.clientWidth,
    scrolls: page.documentElement.scrollWidth,
    background: style.backgroundColor,
    ink: style.color,
    oneWordWide: cells.filter((cell) => words(cell) > 3 && lines(cell) >= words(cell))
      .map((cell) => cell.innerText),
    pictures: [...page.images].map((image) => [image.alt, image.naturalWidth]),
    outside: [...page.querySelectorAll("[src], [href]")]
      .map((part) => part.getAttribute("src") ?? part.getAttribute("href"))
      .filter((address) => !/^(data:|#)/.test(address)),
    sortable: page.querySelectorAll("table.sortable th button").length,
  };
};
"""


def run(script: str, folder: Path, *flags: str) -> Any:
    """What a script leaves in ``result``, once everything on its page is loaded."""
    file = folder / "page.html"
    file.write_text(
        '<!doctype html><html style="color-scheme: light dark"><body><script>'
        f"let result = null;\n{script}\n"
        "addEventListener('load', () => { const found = document.createElement('pre');"
        "found.id = 'result'; found.textContent = JSON.stringify(typeof result === 'function' ?"
        "result() : result); document.body.replaceChildren(found); });"
        "</script></body></html>"
    )
    shown = _chromium(folder, *flags, "--dump-dom", file.as_uri())
    found = re.search(r'<pre id="result">(.*?)</pre>', shown, re.DOTALL)
    assert found, shown[-2000:]
    return json.loads(html.unescape(found[1]))


def looked_at(
    pages: Mapping[str, Path], widths: Sequence[int], folder: Path, *, dark: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """(page, width) → what a browser shows of it."""
    texts = {name: page.read_text() for name, page in pages.items()}
    shown = json.dumps([[name, texts[name], width] for name in pages for width in widths])
    script = f"""{LOOK}
    const frames = {shown.replace("</", "<" + chr(92) + "/")}.map(([name, text, width]) => {{
      const frame = document.createElement("iframe");
      Object.assign(frame, {{ srcdoc: text, width, height: 900 }});
      document.body.append(frame);
      return [name, width, frame];
    }});
    result = () => frames.map(([name, width, frame]) => [name, width, look(frame.contentDocument)]);
    """
    found = run(script, folder, *([DARK] if dark else []))
    return {(name, width): seen for name, width, seen in found}


def screenshot(page: Path, width: int, folder: Path, *, dark: bool) -> Image.Image:
    """The first screen of a page, 800 pixels high."""
    file = folder / "screen.png"
    flags = [f"--window-size={width},800", f"--screenshot={file}", *([DARK] if dark else [])]
    _chromium(folder, *flags, page.as_uri())
    return Image.open(file)


def _chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    return done.stdout


def luminance(color: str) -> float:
    """Of a CSS colour "rgb(r, g, b)": 0 is black, 1 is white."""
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def check_page(seen: Mapping[str, Any], *, dark: bool) -> None:
    """A page does not scroll sideways, has readable colours, no column of single words, pictures
    with texts that hold numbers, and nothing from elsewhere."""
    assert seen["scrolls"] <= seen["width"]
    assert not seen["oneWordWide"], seen["oneWordWide"][:5]
    assert seen["outside"] == []

    background, ink = luminance(seen["background"]), luminance(seen["ink"])
    assert background < 0.2 if dark else background > 0.9
    assert abs(background - ink) > 0.6

    for text, width in seen["pictures"]:
        assert width > 100  # it was decoded
        assert len(text.split()) > 5 and re.search(r"\d", text), text
