"""Merge checkpoints by a mergekit configuration: scripts/merge.py CONFIG.yml OUT (see --help)."""

from lm.cli.merge import main

if __name__ == "__main__":
    main()
