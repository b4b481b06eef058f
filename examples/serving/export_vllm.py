"""The LoRA names of a pack as PEFT folders, and the command lines by which vLLM serves them.

    python examples/serving/export_vllm.py --pack pack --out exported

writes exported/<name> for every name (or for --names books songs), and prints `vllm serve ... --lora-modules ...`. vLLM
then takes a name as "model" in a request. It knows no adapters, and no heads of classifiers: such names are refused, a
head is left out of what --no-head exports.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from adamix_kernels import export_peft, load, unpack
from adamix_kernels.models.state import adamix_state

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def export(folder, out, names=None, head=True):
    """{name: rank} of the PEFT folders out/<name>. Raises ValueError for names that vLLM has no place for."""
    model, _ = load(folder)
    entries = model.adamix.pack.entries
    unknown = [name for name in names or () if name not in entries]
    if unknown:
        raise ValueError(f"names: got {unknown[0]!r}, expected some of {', '.join(entries)}")
    base = getattr(model.config, "_name_or_path", "")
    ranks = {}
    for name in names or entries:
        if entries[name].heads and head:
            raise ValueError(f"{name}: got a name with a head of its own, which vLLM cannot load, expected --no-head")
        with tempfile.TemporaryDirectory() as alone:
            one, _ = load(unpack(model, name, alone), model=base or None)
            if adamix_state(one).config.method != "lora":
                raise ValueError(f"{name}: got adapters, which vLLM cannot load, expected a name trained as LoRA")
            export_peft(one, Path(out, name), head=head)
        settings = json.loads(Path(out, name, "adapter_config.json").read_text(encoding="utf-8"))
        ranks[name] = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    return base, ranks


def command(base, out, ranks):
    """What a shell is given."""
    most = max(ranks.values())
    room = next((rank for rank in RANKS if rank >= most), None)
    if room is None:
        raise ValueError(f"rank: got {most}, expected at most {RANKS[-1]}, the most that vLLM takes")
    modules = [f"{name}={Path(out, name)}" for name in ranks]
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(len(ranks))]
    return shlex.join([*words, "--lora-modules", *modules])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", required=True, help="a folder of adamix pack or save_pack")
    parser.add_argument("--out", type=Path, required=True, help="folder for a PEFT folder of each name")
    parser.add_argument("--names", nargs="+", help="default: all")
    parser.add_argument("--no-head", action="store_true", help="leave heads out")
    options = parser.parse_args(arguments)
    try:
        base, ranks = export(options.pack, options.out, options.names, not options.no_head)
        line = command(base, options.out, ranks)
    except ValueError as error:
        parser.error(str(error))
    for name, rank in ranks.items():
        print(f"{options.out / name}: rank {rank}")
    print(line)


if __name__ == "__main__":
    main()
