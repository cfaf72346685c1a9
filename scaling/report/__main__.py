"""The report again, from what a results folder holds:  python -m scaling.report DIR"""

import argparse
import sys
from collections.abc import Sequence

from scaling import storage, terminal
from scaling.report.page import build


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.report",
        description="Write report.html and figures from the records and fits of a results folder.",
    )
    parser.add_argument(
        "results",
        help="results folder of a sweep, as in results/chinchilla or gs://bucket/chinchilla; or that of a "
        "group in it, as in results/known_entropy/source=markov",
    )
    parser.add_argument("--out", help="the HTML file (default: report.html in the folder)")
    args = parser.parse_args(argv)
    try:
        print(build(args.results, args.out))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except storage.errors() as e:
        print(f"error: {args.results}: {storage.first_line(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
