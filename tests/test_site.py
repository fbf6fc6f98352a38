"""`scripts/check_site.py` opens the pages of a site and finds what is wrong with them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_site.py"
PAGE = '<!doctype html><title>a page</title><link rel="icon" href="data:,"><h1 id="place">a page</h1>'
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"

SOUND = {
    "index": '<a href="table.html#place">a</a> <a href="#place">b</a> <a href="https://example.org/x">c</a>',
    "table": '<div style="overflow-x: auto"><div style="width: 2000px">scrolls by itself</div></div>',
    "picture": f'<img src="{PIXEL}" loading="lazy">',
}
BROKEN = {
    "no-page": ('<a href="nowhere.html">a</a>', "dead link: http"),
    "no-place": ('<a href="index.html#nowhere">a</a>', "dead link: http"),
    "no-address": ('<a href="https://nowhere">a</a>', "dead link: https://nowhere"),
    "no-picture": ('<img src="nowhere.png">', "missing picture: nowhere.png"),
    "console": ('<script>console.error("broken")</script>', "console: broken"),
    "script": ("<script>undefined_function()</script>", "script: "),
    "wide": ('<div style="width: 500px">wide</div>', "508 pixels wide at 390, beyond the edge: <div"),
}


def test_each_fault_of_a_site_is_found_on_its_page_and_none_on_sound_pages(tmp_path):
    spec = importlib.util.spec_from_file_location("check_site", SCRIPT)
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    if reason := checker.why_not():
        pytest.skip(f"The pages of a site are not opened: {reason}")
    for name, content in SOUND.items() | {(name, fault) for name, (fault, _) in BROKEN.items()}:
        (tmp_path / f"{name}.html").write_text(PAGE + content)
    faults, pages = checker.check(tmp_path)
    assert pages == len(SOUND) + len(BROKEN)
    assert {fault.partition(".html: ")[0] for fault in faults} == set(BROKEN)
    for name, (_, message) in BROKEN.items():
        assert any(fault.startswith(f"{name}.html: {message}") for fault in faults), faults


def test_without_a_browser_it_says_so_and_passes(tmp_path):
    found = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("The pages were not opened: ")
