"""``sievit reproduce``: run one trial again and compare."""

from __future__ import annotations

import argparse

from ablations.cli.options import FAILED, OK, Command, add_old_out, add_out, store_of
from ablations.records.files import user_path

_EPILOG = """\
examples:
  sievit reproduce 3f9c1b --out results
  sievit reproduce 3f9c1b --out s3://bucket/runs/a --data /mnt/imagenet/val

Nothing of the run is used but its record: images are decoded, settings sought and weights finetuned once more. Every
column but times, memory, device and versions is compared, and every image, to the last bit.
exit status: 0 the same, 1 not the same, 2 bad input, 130 interrupted
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_old_out(parser)
    parser.add_argument("key", metavar="KEY", help="the trial's key, or how it begins")
    add_out(parser, "where it is on record: a folder, or s3://BUCKET/FOLDER")
    parser.add_argument("--data", metavar="DIR", help="where the images are by now (as the run had them)")
    parser.add_argument("--train-data", metavar="DIR", help="where the training images are by now")
    parser.add_argument("--labels", metavar="FILE", help="where the file of labels is by now")
    parser.add_argument("--weights", metavar="FILE", help="where the model's weights are by now")
    parser.add_argument(
        "--scratch", type=user_path, metavar="DIR", help="a folder to work in and to keep (a temporary one)"
    )


def _reproduce(arguments: argparse.Namespace) -> int:
    from ablations.run.reproduce import report, reproduce

    found = reproduce(
        store_of(arguments), arguments.key, data=arguments.data or None, train_data=arguments.train_data or None,
        weights=arguments.weights or None, labels=arguments.labels or None, scratch=arguments.scratch,
    )  # fmt: skip
    print("\n".join(report(found)))
    return OK if found.same else FAILED


COMMAND = Command(
    summary="run one trial again and compare",
    description="Run one trial of a run again, from its record alone, and compare to the last bit.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_reproduce,
    lasting=True,
)
