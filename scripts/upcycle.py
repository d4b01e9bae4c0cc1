"""Make a mixture of experts: scripts/upcycle.py CONFIG.yml OUT (see --help)."""

from lm.cli.merge_tools import upcycle

if __name__ == "__main__":
    upcycle()
