"""python -m openvla_jax.data inspect bridge_orig --data_dir DIR | stats MIXTURE --data_dir DIR [--output FILE]"""

import argparse
import json
import logging
import sys

from etils import epath

from openvla_jax.data import statistics
from openvla_jax.data.directory import Source, shares
from openvla_jax.data.mixture import open_sources
from openvla_jax.data.rlds import dataset_statistics


def inspect(sources: list[Source], stats: dict[str, dict]) -> None:
    """Prints where each dataset was found, its schema, what is used of it, its episodes and its statistics."""
    for source in sources:
        config = source.config
        print(f"dataset {source.name}, version {source.info.version}: {source.directory}")
        print(f"schema: {source.info.features}")
        print(f"cameras {config.image_keys}, depth {config.depth_keys}, state {config.state_keys}")
        print(f"state {config.state_encoding.name}, actions {config.encoding_name}")
        used = {split: sum(share.take for share in shares(source, split)) for split in ("train", "val")}
        print(f"episodes {source.splits}; used {used}")
    print(statistics.table(stats))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m openvla_jax.data", description="Look at RLDS datasets.")
    parser.add_argument("command", choices=["inspect", "stats"], help="everything, or the action statistics alone")
    parser.add_argument("dataset", help="a dataset or a mixture")
    parser.add_argument("--data_dir", required=True, help="the folder that holds the datasets")
    parser.add_argument("--statistics_dir", help="keep computed statistics here, not beside the data")
    parser.add_argument("--proprio", action="store_true", help="statistics of the state too")
    parser.add_argument("--output", help="write the statistics to this JSON file, as data.statistics reads them")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # TFDS tells what it opens
    try:
        sources, _ = open_sources(args.dataset, args.data_dir)
        options = {"cache_dir": args.statistics_dir, "load_proprio": args.proprio}
        stats = {source.name: dataset_statistics(source, **options) for source in sources}
        if args.command == "inspect":
            inspect(sources, stats)
        else:
            print(statistics.table(stats))
        if args.output:
            epath.Path(args.output).write_text(json.dumps(stats, indent=2) + "\n")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
