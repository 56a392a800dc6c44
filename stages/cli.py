"""The command `acetate`: the tasks of dodo.py, from any folder, with the user's argument list as it is."""

import argparse
import os
import sys

from stages.errors import AcetateError

_STAGES = ("prepare", "mount", "execute", "scan", "copy", "perms", "unmount", "cleanup")

_EXAMPLES = """examples:
  acetate run -- make -j2 test              run, then copy what changed to this folder
  acetate scan --root app --root lib -- sh build.sh
                                            run, list what would change, touch nothing
  acetate copy perms unmount cleanup        copy what the newest open run changed
  acetate cleanup --discard                 drop it

exit status:
  0 done; the command's own status (128+n for signal n, 124 after --timeout) when it failed;
  1 a stage failed; 2 bad input or an unfit machine, nothing was touched; 3 conflicts, nothing was copied
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that the arguments (by default those of the process) name; return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    own, argv = words, None
    if "--" in words:
        at = words.index("--")
        own, argv = words[:at], words[at + 1 :]
    options = _parser().parse_args(own)
    try:
        return _run(options, argv)
    except AcetateError as error:
        sys.stderr.writelines(f"acetate: {line}\n" for line in str(error).splitlines())
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acetate",
        usage="acetate run|STAGE… [option…] [-- COMMAND [ARGUMENT…]]",
        description="Run a command with every write caught in an overlay; list what it changed; copy or drop it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "stages",
        nargs="+",
        choices=("run", *_STAGES, "undo", "runs", "prune", "gc"),
        metavar="STAGE",
        help=", ".join(_STAGES),
    )
    parser.add_argument(
        "--root", action="append", metavar="DIR", help="folder that the command may write to (default: .)"
    )
    parser.add_argument("--spec", metavar="FILE", help="read the request from a JSON or TOML file")
    parser.add_argument("--network", action="store_true", help="let the command use the network")
    parser.add_argument("--timeout", metavar="SECONDS", help="end everything the command started after that time")
    parser.add_argument(
        "--on-failure", choices=("keep", "copy"), help="what to do with the changes of a failed command"
    )
    parser.add_argument("--conflicts", choices=("stop", "skip", "overwrite"), help="what copy does on conflicts")
    parser.add_argument("--no-sync", action="store_true", help="do not wait until the copied data is on disk")
    parser.add_argument("--run", metavar="ID", help="go on with this run instead of the newest open one")
    parser.add_argument("--discard", action="store_true", help="let cleanup drop changes that were not copied")
    parser.add_argument("--keep", metavar="N", help="let prune keep the newest N runs")
    parser.add_argument("--older", metavar="DAYS", help="let prune drop only runs from more than DAYS days ago")
    parser.add_argument("--again", action="store_true", help="do the named stages even if they are done, and only them")
    return parser


def _run(options: argparse.Namespace, argv: list[str] | None) -> int:
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    import dodo

    named = {
        "spec": options.spec,
        "timeout": options.timeout,
        "on_failure": options.on_failure,
        "conflicts": options.conflicts,
        "run": options.run,
        "network": "yes" if options.network else None,
        "sync": "no" if options.no_sync else None,
        "discard": "yes" if options.discard else None,
        "keep": options.keep,
        "older": options.older,
        "roots": options.root,
        "argv": argv,
    }
    given = {name: value for name, value in named.items() if value is not None}
    dodo.SESSION.options = lambda: given
    dodo.SESSION.folder = os.getcwd
    dodo.REPORTER.go_on, dodo.REPORTER.discard = "acetate {stages} --run {run}", "--discard"
    words = ["run", *(["--single", "--always"] if options.again else [])]
    # No configuration file: those of the current folder belong to the project, which is not to be trusted.
    doit = DoitMain(ModuleTaskLoader(dodo), config_filenames=())
    status = doit.run([*words, *(stage for stage in options.stages if stage != "run")])
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
