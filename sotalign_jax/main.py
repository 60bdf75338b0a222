"""``sotalign COMMAND [flags]``: one entry point; each command is a function of `commands`."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sotalign_jax import commands, data_commands, encode_commands, interop_commands, sweep_commands
from sotalign_jax.commands import needed
from sotalign_jax.config import explain
from sotalign_jax.training.distributed import Preempted, left_to_first, quick_end

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as FILE.py or FILE.py:arg.")
flags.DEFINE_string("workdir", None, "Directory of the run; given again, it goes on.")
_IMAGE = flags.DEFINE_string("image", None, "Image features: any format that `inspect` opens.")
_TEXT = flags.DEFINE_string("text", None, "Text features.")
_OUT = flags.DEFINE_string("out", None, "Where to write.")

COMMANDS = {
    "train": lambda: commands.train(needed("config"), needed("workdir")),
    "compare": lambda: commands.compare(needed("config"), needed("workdir")),
    "evaluate": lambda: data_commands.evaluate(needed("workdir")),
    "embed": lambda: commands.embed(needed("workdir"), _IMAGE.value, _TEXT.value, _OUT.value),
    "diagnose": lambda: commands.diagnose(needed("config"), _OUT.value),
    "fit-teacher": lambda: commands.fit_teacher(needed("config"), needed("out")),
}
WORDS = {"inspect": commands.inspect, "report": lambda words: commands.report(words, _OUT.value)}
WORDS |= data_commands.WORDS | encode_commands.WORDS
WORDS |= interop_commands.WORDS | sweep_commands.WORDS


def _main(argv: list[str]) -> int:
    name, *paths = argv[1:]
    try:
        if name in WORDS:
            return status if isinstance(status := WORDS[name](paths), int) else 0
        if paths:
            raise ValueError(f"{paths[0]}: unexpected; flags are written --name=value")
        if name not in ("train", "compare") and (other := left_to_first()):
            print(f"sotalign {name}: left to process 0 of {other.process_count} ({other.method})")
        else:
            COMMANDS[name]()
    except Preempted as stop:
        print(f"sotalign {name}: {stop}")
    except (ValueError, OSError, ImportError) as error:
        return commands.tell(name, "error", str(error), 2)
    except FloatingPointError as error:
        return commands.tell(name, "training stopped", str(error), 3)
    return 0


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(sweep_commands.with_config_flag(argv))
        if _CONFIG.value is not None:
            _CONFIG.value.items()  # a config file that was not found fails when it is first used
    except Exception as error:  # a config file is a program: anything may come out of it
        sys.exit(commands.tell(argv[1], "error", explain(error, argv), 2))
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # or absl will show all that orbax has to say
    return rest


def run() -> None:
    """Entry point of the ``sotalign`` command."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in (*COMMANDS, *WORDS):
        print(commands.USAGE)
        sys.exit(0 if command in ("", "help", "-h", "--help") else 2)
    with quick_end():
        app.run(_main, flags_parser=_parse)
