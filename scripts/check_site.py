"""Builds the documentation and opens every page in a browser: `python scripts/check_site.py`.

Fails on a warning of the build, and on each page with a dead link, a picture that is missing, an error on the console,
or horizontal scrolling at the widths of a telephone and of a screen. Links that leave the site are read, not followed.

Needs the extra `docs`, and Chromium or Chrome. Without a browser the site is built, and no page is opened; it says so.
"""

import argparse
import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

DOCS = Path(__file__).parents[1] / "docs"
WIDTHS = (390, 1300)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# What is asked of a page. Pictures that load when they are scrolled to are loaded first.
LOOK = """
async () => {
    const pictures = [...document.images];
    pictures.forEach(picture => picture.loading = "eager");
    const missing = await Promise.all(pictures.map(
        picture => picture.decode().then(() => null, () => picture.getAttribute("src"))));
    const page = document.scrollingElement;
    const beyond = [...document.body.querySelectorAll("*")]
        .filter(element => element.getBoundingClientRect().right > page.clientWidth + 1)
        .map(element => `<${element.tagName.toLowerCase()} class="${element.className}">`);
    return {
        missing: missing.filter(source => source !== null),
        scrolls: page.scrollWidth > page.clientWidth ? page.scrollWidth : 0,
        beyond: beyond.slice(0, 3),
        links: [...document.querySelectorAll("a[href]")].map(link => link.href),
        places: [...document.querySelectorAll("[id], a[name]")].map(place => place.id || place.name),
    };
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", help="a site that is built already; default: docs/, built anew")
    parser.add_argument("--screenshots", type=Path, help="a folder for a picture of each page at each width")
    options = parser.parse_args()
    site = options.site
    if site is None:
        site = DOCS / "_build"
        shutil.rmtree(site, ignore_errors=True)  # Pages of earlier builds may be left in it.
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(site)]
        if subprocess.run(command, check=False).returncode:
            return 1
    reason = why_not()
    if reason:
        print(f"The pages were not opened: {reason}")
        return 0
    faults, pages = check(site, options.screenshots)
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{pages} pages at {' and '.join(map(str, WIDTHS))} pixels: {len(faults) or 'no'} faults.")
    return bool(faults)


def why_not() -> str | None:
    """Say what is missing for opening pages."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed."
    return None if browser() else f"none of {', '.join(BROWSERS)} is on the PATH."


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def check(site: Path, screenshots: Path | None = None) -> tuple[list[str], int]:
    """Open each page under ``site`` at each width; return the faults, sorted, and the number of pages."""
    from playwright.sync_api import sync_playwright

    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    if not names:
        return [f"{site} holds no page."], 0
    faults: set[str] = set()
    links: dict[str, list[str]] = {}
    places: dict[str, set[str]] = {}
    with served(site) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        for width in WIDTHS:
            tab = chromium.new_page(viewport={"width": width, "height": 900})
            seen = listen(tab)
            for here in names:
                tab.goto(f"{address}/{here}")
                found = tab.evaluate(LOOK)
                faults.update(f"{here}: {fault}" for fault in seen)
                seen.clear()
                faults.update(f"{here}: missing picture: {source}" for source in found["missing"])
                if found["scrolls"]:
                    wide = ", ".join(found["beyond"])
                    faults.add(f"{here}: {found['scrolls']} pixels wide at {width}, beyond the edge: {wide}")
                links[here], places[here] = found["links"], {*found["places"], "", "top"}
                if screenshots:
                    screenshots.mkdir(parents=True, exist_ok=True)
                    tab.screenshot(path=screenshots / f"{here.replace('/', '.')}.{width}.png", full_page=True)
            tab.close()
        chromium.close()
        for here, targets in links.items():
            faults.update(f"{here}: dead link: {target}" for target in targets if dead(target, address, site, places))
    return sorted(faults), len(names)


def listen(tab: Any) -> list[str]:
    """Write errors on the console, and what cannot be loaded, into a list, as they come."""
    seen = []

    def console(message: Any) -> None:
        if message.type == "error":
            seen.append(f"console: {message.text}")

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # which is no fault: the next page was asked for meanwhile
            seen.append(f"not loaded: {request.url}")

    tab.on("console", console)
    tab.on("pageerror", lambda error: seen.append(f"script: {error}"))
    tab.on("requestfailed", failed)
    return seen


def dead(target: str, address: str, site: Path, places: dict[str, set[str]]) -> bool:
    """Tell whether a link leads nowhere: to no file or place of the site, or to what is no address at all."""
    page, place = urldefrag(target)
    if not page.startswith(f"{address}/"):
        parts = urlsplit(target)
        return not ((parts.scheme in ("http", "https") and "." in parts.netloc) or (parts.scheme == "mailto"))
    name = unquote(urlsplit(page).path).lstrip("/")
    if not name or name.endswith("/"):
        name += "index.html"
    return not (site / name).is_file() or (name in places and unquote(place) not in places[name])


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a folder on this machine; give the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    sys.exit(main())
