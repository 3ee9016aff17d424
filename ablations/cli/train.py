"""``sievit train``: a method trained, and put beside random drop."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ablations.cli.options import OK, Command, add_data_options, add_model_options
from ablations.records.files import user_path
from ablations.words import table

log = logging.getLogger("ablations")

_OUT = Path("results/embedded")  # beside what `make ablations` leaves

_EPILOG = """\
examples:
  sievit train                       the methods that can be trained
  sievit train dynamicvit            on the embedded workload, minutes on two cores
  sievit train dynamicvit tps        one after the other, one table
  sievit train all
  sievit train avit --set epochs=1 images=512          a shorter training
  sievit train dynamicvit --at 3,6,9 --settings '{"budget": {"ratio": 0.5}}'     at another budget
  sievit train dynamicvit --workload imagefolder --data imagenette --weights deit_tiny.safetensors \\
      --set epochs=5 lr=1e-4

Trains the method as ablations/specs/trained_methods.yaml says, evaluates it, brings random drop at three blocks to the
same cost, evaluates that off the shelf and after a training on as many images, and prints one table with a verdict.

written below OUT:
  train/METHOD/finetuned.safetensors   the model's weights
  train/METHOD/reducers.safetensors    the method's own, where it has any
  train/METHOD/train.json              settings and results
  cache/finetuned                      finished trainings, which no command repeats, and checkpoints

A training may be stopped at any time; the same command goes on where it stopped. One placement without comparison:
python -m ablations.measure.finetune --help
exit status: 0 all is well, 2 bad input, 130 interrupted
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="registered names, or all (none: list them)")
    parser.add_argument("--out", type=user_path, default=_OUT, metavar="OUT", help=f"folder ({_OUT})")
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--at", metavar="BLOCKS", help="place the method here: 3, 3-11, all or 3,6,9 (as the spec)")
    parser.add_argument("--settings", metavar="JSON", help="the method's settings (as the spec)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of the recipe: epochs=1"
    )


def _train(arguments: argparse.Namespace) -> int:
    from ablations.measure.context import use_exact_float32
    from ablations.measure.opening import choose_device, open_context, open_subject
    from ablations.models.model_names import chosen_name
    from ablations.records.names import CACHE
    from ablations.run import train
    from ablations.trial.recipe import parse_settings
    from ablations.workloads import ImageSource, Reading, default_models, parse_sampling

    known = train.trainable()
    if not arguments.methods:
        print("\n".join(["methods that can be trained:", *(f"  {name}" for name in known)]))
        return OK
    main = arguments.model or default_models(arguments.workload)[0]
    model = chosen_name(main, arguments.img_size, arguments.frames or None)
    depth, first = train.blocks_of(model)
    settings = None if arguments.settings is None else train.parse_method_settings(arguments.settings)
    asked = [
        one
        for method in (known if arguments.methods == ["all"] else arguments.methods)
        for one in train.asked_for(
            method,
            depth=depth,
            first=first,
            where=arguments.at,
            settings=settings,
            recipe=parse_settings(arguments.set),
        )
    ]
    use_exact_float32()
    source = ImageSource(
        arguments.workload, arguments.data or None, arguments.train_data or None, limit=arguments.limit,
        reading=Reading(arguments.labels or None, not arguments.no_links),
        sampling=parse_sampling(arguments.stride, arguments.views),
    )  # fmt: skip
    cache = arguments.out / CACHE
    subject = open_subject(source, model, weights=arguments.weights or None, cache=cache)
    context = open_context(subject, choose_device(), cache=cache)
    print(train.headline(context))
    compared = []
    for one in asked:
        compared.append(train.train(one, context))
        size = 100 * compared[-1].lead[0]  # a verdict takes all of them
        log.info("%s: %+.1f points; in %s", one.variant, size, train.save(compared[-1], context, arguments.out))
    compared = train.conclude(compared, context, arguments.out)
    print(table(train.COLUMNS, [train.line(one) for one in compared]))
    print(train.closing(compared))
    return OK


COMMAND = Command(
    summary="train a method and compare it with random drop",
    description="Train methods, one after the other, and compare each with random drop at the same cost.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_train,
    lasting=True,
)
