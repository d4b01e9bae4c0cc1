"""Train a byte-level BPE tokenizer on any data source: see --help."""

from lm.cli.tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
