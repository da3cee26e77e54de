"""A page in a real browser: what a probe that runs inside it saw."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
)

# Goes into the page's head: collects errors of scripts and resources, and writes what it saw into the
# document, where --dump-dom shows it. %s: statements that may add to `found`.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const found = {};
  %s
  Object.assign(found, {
    errors,
    images: [...document.images].map(image => [image.alt, image.naturalWidth]),
    overflow: document.documentElement.scrollWidth - innerWidth,
    outside: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  });
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


class _Body(HTMLParser):
    """Reads the probe's findings out of a dumped document."""

    found: dict

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            self.found = json.loads(dict(attrs)["data-found"])


def probe(page: str, folder: Path, width: int, statements: str = "") -> dict:
    """Opens the page in Chromium and returns what the probe found.

    Always: `errors`, `images` as (alt, width of the pixels), `overflow` in pixels to the right, `outside`
    resources.
    """
    if not (chromium := shutil.which("chromium")):
        pytest.fail("pages are checked in Chromium: install 'chromium' (Debian: apt-get install chromium)")
    path = folder / "probed.html"
    path.write_text(page.replace("<head>", f"<head>{PROBE % statements}", 1))
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [chromium, *FLAGS, profile, f"--window-size={width},900", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    body = _Body()
    body.feed(result.stdout)
    return body.found
