"""``studio ui``."""

from collections.abc import Sequence
from pathlib import Path

from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Serve the page."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on [%(default)s]")
    parser.add_argument("--open", action="store_true", help="show the page in your browser")
    parser.add_argument("--home", type=Path, metavar="FOLDER", help="workspace [STUDIO_HOME or ~/.studio]")
    arguments = parser.parse_args(argv)
    from studio.ui.app import serve

    serve(
        arguments.host,
        arguments.port,
        arguments.open,
        arguments.home,
        on_ready=lambda address: print(f"The page is at {address}. Ctrl-C ends it.", flush=True),
    )
    return 0
