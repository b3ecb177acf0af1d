"""A page as a browser shows it."""

import json
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_WORDS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",
    "--dump-dom",
]
_CHECK = """<script>window.addEventListener("load", () => {
  document.body.setAttribute("data-seen", JSON.stringify(
    [...document.querySelectorAll("figure")].map(f => [f.id, f.querySelector("img").naturalWidth, f.offsetHeight])));
});</script></body>"""


def seen_figures(path, folder, night=False):
    """Return how wide and high each figure of a page is, by id; the copy that is opened may run a script, which the page itself forbids."""
    source = path.read_text()
    watched = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace("</body>", _CHECK)
    assert watched.count("<script>") == 1
    (folder / "page.html").write_text(watched)
    more = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if night else []
    done = subprocess.run(
        [CHROMIUM, *_WORDS, *more, f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (seen,) = re.findall(r'data-seen="(.*?)"', done.stdout)
    return {name: (width, height) for name, width, height in json.loads(seen.replace("&quot;", '"'))}
