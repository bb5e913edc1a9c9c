"""The project is described in pyproject.toml; this file is for the tools that expect it."""

from pathlib import Path

from setuptools import setup

readme = Path(__file__).parent / "README.md"

setup(
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
)
