"""Permute a model to match another: scripts/align.py REFERENCE MODEL OUT (see --help)."""

from lm.cli.merge_tools import align

if __name__ == "__main__":
    align()
