"""pyproject.toml holds the metadata; this file is where the compiled extension will be declared."""

from setuptools import setup

setup()
