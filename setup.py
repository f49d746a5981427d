"""Metadata lives in pyproject.toml; the CUDA extension is built by build_tools/."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build backends don't
from build_tools.commands import setup_options

setup(**setup_options())
