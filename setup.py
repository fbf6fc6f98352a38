"""Makes the README's links absolute for pages outside the repository; all the rest stands in setup.cfg."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
settings = ConfigParser()
settings.read(root / "setup.cfg", encoding="utf-8")
source = settings["metadata"]["url"]


def absolute(match: "re.Match[str]") -> str:
    """A picture is fetched as it is, and a page shown."""
    picture, text, path = match.groups()
    return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/main/{path})"


readme = (root / "README.md").read_text(encoding="utf-8")
setup(long_description=re.sub(r"(!?)\[([^][]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, readme))
