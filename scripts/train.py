"""Train a language model: scripts/train.py RECIPE --dotted.field value ... (see --help)."""

from lm.cli.train import main

if __name__ == "__main__":
    main()
