"""Search a merge's coefficients: scripts/evolve_merge.py TEMPLATE.yml OUT --command '...'."""

from lm.cli.merge_tools import evolve

if __name__ == "__main__":
    evolve()
