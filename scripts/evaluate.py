"""Loss, perplexity and bits per byte: scripts/evaluate.py RUN (see --help)."""

from lm.cli.evaluate import main

if __name__ == "__main__":
    main()
