"""Take files to a machine and back where only so much can be moved at once.

`carry.py pack FILE_OR_FOLDER... --to .carry --mib 48` cuts what is given, below the current folder,
into .carry/0, .carry/1, ..., of at most that size each, with a list of digests in every part.
`carry.py join .carry` puts together what is complete so far, checks every file and says what is
missing; parts may come one after another, and a part that was joined may be gone. Uses the standard
library only.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

LIST = "list.json"
DONE, FAILED, MISSING = 0, 1, 2


def pack(sources: list[Path], to: Path, mib: float) -> int:
    """Cut files into parts; returns how many there are."""
    limit = max(1, int(mib * 2**20))
    files = sorted(
        path
        for source in sources
        for path in ([source] if source.is_file() else source.rglob("*"))
        if path.is_file()
    )
    if to.exists():
        shutil.rmtree(to)
    entries, number, room = [], 0, limit
    for path in files:
        data = path.read_bytes()
        pieces, start = [], 0
        while start < len(data) or not pieces:
            if room == 0:
                number, room = number + 1, limit
            piece = data[start : start + room]
            name = f"{len(entries)}-{len(pieces)}"
            (to / str(number)).mkdir(parents=True, exist_ok=True)
            (to / str(number) / name).write_bytes(piece)
            pieces.append([number, name])
            start, room = start + len(piece), room - len(piece)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"path": path.as_posix(), "sha256": digest, "pieces": pieces})
    for part in to.iterdir():
        (part / LIST).write_text(json.dumps(entries), encoding="utf8")
    return number + 1


def join(folder: Path, to: Path) -> tuple[list[str], list[str]]:
    """Write every file whose pieces have come; returns the paths that are there, and that are not.

    Pieces are collected in `to`/.joining until their file is complete.
    """
    kept = to / ".joining"
    for part in sorted(folder.iterdir()) if folder.is_dir() else []:
        if part.is_dir():
            shutil.copytree(part, kept / part.name, dirs_exist_ok=True)
    lists = sorted(kept.glob(f"*/{LIST}"))
    if not lists:
        raise FileNotFoundError(f"no parts in {folder}")
    there, missing = [], []
    for entry in json.loads(lists[0].read_text(encoding="utf8")):
        path = to / entry["path"]
        if not _sound(path, entry["sha256"]):
            pieces = [kept / str(number) / name for number, name in entry["pieces"]]
            if not all(piece.is_file() for piece in pieces):
                missing.append(entry["path"])
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
            if not _sound(partial, entry["sha256"]):
                partial.unlink()
                raise ValueError(f"{entry['path']} was changed on its way; pack it again")
            partial.replace(path)
        there.append(entry["path"])
    if not missing:
        shutil.rmtree(kept)
    return there, missing


def _sound(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 all there, 1 damaged, 2 parts are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("sources", type=Path, nargs="+")
    packing.add_argument("--to", type=Path, default=Path(".carry"))
    packing.add_argument("--mib", type=float, default=48.0)
    joining = commands.add_parser("join")
    joining.add_argument("folder", type=Path)
    joining.add_argument("--to", type=Path, default=Path())
    options = parser.parse_args(arguments)
    if options.command == "pack":
        absent = [str(path) for path in options.sources if not path.exists()]
        if absent:
            sys.stderr.write(f"not there: {', '.join(absent)}\n")
            return MISSING
        count = pack(options.sources, options.to, options.mib)
        sys.stdout.write(f"{count} parts in {options.to}\n")
        return DONE
    try:
        there, missing = join(options.folder, options.to)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return MISSING
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    sys.stdout.write(f"{len(there)} files there, missing: {', '.join(missing) or 'none'}\n")
    return MISSING if missing else DONE


if __name__ == "__main__":
    sys.exit(main())
