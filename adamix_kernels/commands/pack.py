"""adamix pack: several runs, trained apart, as one folder that serves them by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models._staging import TOKENIZER_NAME, write_tokenizer
from ..models.header import CHECKPOINT_NAME, PACK_NAME
from ..models.hub import resolve_folder
from ..models.run_values import run_folder
from ..packs.folder import read_pack, save_pack
from ..packs.pack import pack
from ..packs.reading import called, one_adaptation
from ..packs.state import check_name, pack_of
from ..packs.words import all_files, refuse_other_words
from ..tasks import load_base, read_run
from ..tasks._pretrained import first_line, tokenizer_of
from ._folder import kept
from ._options import OutputOptions, needs_out, option, quiet, start
from ._parser import OptionParser


@dataclass
class PackOptions:
    _argument_group_name = "pack"

    out: str = option("folder for the pack", "")
    model: str | None = option("hub id or folder of the encoder, where the first folder does not lead to it")
    capacity: int | None = option("slots, to add names later; as many as names")
    max_rank: int = option("ranks that later names may have, if more than these", 1)
    max_labels: int = option("labels that later names may have, if more than these", 1)


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "pack",
        (PackOptions, OutputOptions),
        "Put runs of one encoder, or PEFT LoRA folders, into one folder, each under a name.",
        words="NAME=FOLDER ...",
    )
    parsed = parser.parse(argv)
    options, output = parsed.parts
    folders = named_folders(parsed.words)
    needs_out(options.out)
    with kept(options.out):
        return _pack(folders, options, output)


def _pack(folders: dict[str, str], options: PackOptions, output: OutputOptions) -> int:
    if (Path(options.out) / CHECKPOINT_NAME).is_file():
        raise ValueError(f"out: {options.out} holds a run, expected another folder")
    if (Path(options.out) / PACK_NAME).is_file():
        lost = [name for name in read_pack(Path(options.out))["names"] if name not in folders]
        if lost:
            raise ValueError(
                f"out: {options.out} holds {', '.join(lost)} too, expected all its names, or another folder"
            )
    start(output)
    for name, folder in folders.items():
        _check_run(name, folder)  # damaged files are answered at once
    first = next(iter(folders))
    with called(first), quiet():
        model, tokenizer = load_base(folders[first], model=options.model)
    for name, folder in folders.items():
        here = resolve_folder(folder)
        if name == first and (here / CHECKPOINT_NAME).is_file():
            continue  # whose tokenizer it is; of PEFT's folder it is the base's
        with called(name):
            _check_tokenizer(tokenizer, here, "its base" if name == first else first)
    pack(
        model, folders, capacity=options.capacity, max_rank=options.max_rank, max_labels=options.max_labels
    )  # fmt: skip
    state = pack_of(model)
    if tokenizer is not None:  # that of the first folder's base, where the folder has none
        with tempfile.TemporaryDirectory() as place:
            write_tokenizer(Path(place), tokenizer)
            state.tokenizer = all_files(Path(place))
    out = save_pack(model, options.out)
    without = [name for name, entry in state.entries.items() if entry.centroid is None]
    if without:
        print(f"note: --route nearest cannot choose: {', '.join(without)} came without the centroid of their texts")
    print(f"pack of {len(folders)} names: {out}")
    return 0


def _check_tokenizer(tokenizer: Any, folder: Path, first: str) -> None:
    """A pack has one. Raises ValueError where that of `folder` has other words for its numbers than `first`'s. One that
    parts a text otherwise is noted."""
    if tokenizer is None or not (folder / TOKENIZER_NAME).is_file():
        return
    try:
        own = tokenizer_of(str(folder), True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"note: the tokenizer of {folder} does not load ({first_line(error)}); all names get that of {first}")
        return
    refuse_other_words(tokenizer, own, f"{str(folder)!r}, in whose tokenizer", first)
    steps: list[Any] = [getattr(one, "backend_tokenizer", None) for one in (tokenizer, own)]
    if None not in steps:
        mine, its = (json.loads(one.to_str()) for one in steps)
        for step in ("normalizer", "pre_tokenizer", "post_processor"):
            if mine[step] != its[step]:
                print(f"note: the tokenizer of {folder} has another {step} than that of {first}, which all names get")


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER of each. Raises ValueError for another word, a name given twice, or none."""
    if not words:
        raise ValueError("got no folder, expected adamix pack NAME=FOLDER NAME=FOLDER ... --out FOLDER")
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder:
            raise ValueError(f"got {word!r}, expected NAME=FOLDER")
        if check_name(name) in found:
            raise ValueError(f"name: got {name!r} twice, expected different names")
        found[name] = folder
    return found


def _check_run(name: str, folder: str) -> None:
    with called(name):
        place = run_folder(one_adaptation(folder))
        if place is not None:
            read_run(place)
