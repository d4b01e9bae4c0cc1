"""One HTML page on a run or several: scripts/report.py RUN... [--output FILE] (see --help)."""

from lm.cli.report import main

if __name__ == "__main__":
    main()
