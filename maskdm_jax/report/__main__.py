"""One self-contained HTML page on any number of runs.

    python -m maskdm_jax.report W1 W2 --out=report.html

The page needs no network: curves, pictures and styles are inside the file. It shows what each
workdir holds, and names the command for what is missing. Needs matplotlib: pip install
'maskdm_jax[demo]'.
"""

import sys

from maskdm_jax.fields import TEXT
from maskdm_jax.report import page
from maskdm_jax.run import command_line


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    example = "python -m maskdm_jax.report W1 W2 --out=report.html"
    parser = command_line.Parser(__doc__, example)
    parser.flag("workdirs", TEXT, "workdirs of runs", [], required=True, many=True)
    parser.flag("--out", TEXT, "the HTML file to write", required=True)

    def write():
        args = parser.parse(argv)
        print(f"report: {page.write(args.workdirs, args.out)}")

    return command_line.exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
