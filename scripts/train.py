"""Train a language model: scripts/train.py RECIPE --dotted.field value ... (see --help)."""

from lm.cli.train import entry

if __name__ == "__main__":
    entry()
