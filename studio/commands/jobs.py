"""``studio jobs``."""

from collections.abc import Sequence
from typing import Any

from studio.errors import UsageError
from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """List the page's jobs, cancel one or try one again."""
    parser.add_argument("action", nargs="?", choices=["list", "cancel", "retry"], default="list")
    parser.add_argument("job", nargs="?", type=int, help="number of the job to cancel or retry")
    arguments = parser.parse_args(argv)
    from studio.jobs import JobStore, workspace

    store = JobStore(workspace().database)
    if arguments.action == "list":
        _print_jobs(store.list())
        return 0
    if arguments.job is None:
        raise UsageError(f"which job? studio jobs {arguments.action} NUMBER; `studio jobs` lists them.")
    state = store.cancel(arguments.job) if arguments.action == "cancel" else store.retry(arguments.job).state
    print(f"job {arguments.job}: {'stopping' if state == 'running' else state}")
    return 0


def _print_jobs(rows: Sequence[Any]) -> None:
    from datetime import datetime

    if not rows:
        print("no jobs yet; the page (studio ui) makes them")
    for job in rows:
        when = datetime.fromtimestamp(job.submitted).strftime("%Y-%m-%d %H:%M")
        what = job.message or job.spec.get("prompt") or ""
        print(f"{job.id:>5}  {job.kind:<9} {job.state:<12} {when}  {what}".rstrip())
