"""The page in a real browser: no console message, every chart drawn, no sideways scrolling."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from vbdcompress.reporting.html import render_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
WATCH = """<script>
window.seen = [];
addEventListener("error", event => seen.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", event => seen.push("blocked " + event.blockedURI));
</script>"""
MEASURE = """<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const charts = [...document.querySelectorAll("svg.chart")].map(svg => {
    const area = svg.getBoundingClientRect();
    const inside = [...svg.querySelectorAll("path, use")].filter(shape => {
      const box = shape.getBoundingClientRect();
      const style = getComputedStyle(shape);
      return box.width + box.height > 0 && (style.fill !== "none" || style.stroke !== "none");
    });
    const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    return {
      key: svg.dataset.chart, width: area.width, height: area.height, shapes: inside.length,
      spilled: texts.filter(box => box.left < area.left - 16 || box.right > area.right + 16).length,
    };
  });
  const page = document.documentElement;
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({charts, seen, inner: innerWidth, scroll: page.scrollWidth});
  document.body.append(pre);
});
</script>"""
FETCH = """<pre id="fetched"></pre><script>
addEventListener("load", () => {
  const inner = document.querySelector("iframe").contentDocument;
  document.querySelector("#fetched").textContent = inner.querySelector("#probe").textContent;
});
</script>"""


@pytest.fixture
def page(report):
    return render_html(report)


def open_page(source, folder, width):
    """What a browser of that width found: the probe's measurements, and its console's lines."""
    assert source.count(POLICY) == 1
    # scripts are for the probe alone; everything else stays forbidden
    probed = source.replace(POLICY, POLICY + "; script-src 'unsafe-inline'", 1)
    probed = probed.replace("<title>", WATCH + "<title>", 1).replace("</body>", MEASURE + "</body>", 1)
    # in a frame, since a window is at least 500 wide
    frame = f'<iframe srcdoc="{escape(probed)}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    page = folder / "page.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}{FETCH}", encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="fetched">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize(("name", "width", "number"), [("page", 1280, 10), ("large_page", 390, 39)])
def test_page_is_drawn_without_console_errors(request, tmp_path, name, width, number):
    probe, console = open_page(request.getfixturevalue(name), tmp_path, width)
    assert console == []
    assert probe["seen"] == []
    assert probe["inner"] == width
    assert probe["scroll"] <= width
    assert len(probe["charts"]) == number
    for chart in probe["charts"]:
        assert chart["width"] > 100, chart
        assert chart["height"] > 60, chart
        assert chart["shapes"] >= 5, chart
        assert chart["spilled"] == 0, chart


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_open_page_notices_what_it_watches_for(page, tmp_path):
    """The probe itself: a script error, a blocked resource, an emptied chart and a wide page are seen."""
    broken = re.sub(r'(<svg[^>]*data-chart="curve0"[^>]*>).*?</svg>', r"\1</svg>", page, flags=re.DOTALL)
    wrong = (
        '<img src="https://example.invalid/x.png"><script>missing()</script><p style="width: 3000px">x</p>'
    )
    probe, console = open_page(broken.replace("</header>", wrong + "</header>"), tmp_path, 1280)
    assert console
    assert any("missing is not defined" in message for message in probe["seen"])
    assert any("blocked https://example.invalid" in message for message in probe["seen"])
    assert probe["charts"][0]["shapes"] == 0
    assert probe["scroll"] > 1280
