"""Score a set of images against real ones, and against another set, without a model.

A set is a directory, tar, zip, parquet file, MDS shards or an .npz (ADM's, or what `ldt sample` writes). The result is
a line of JSON at the end of `output`. With `against=` the two sets are compared: the difference of each score, and the
interval that holds it 95 times of 100.
"""

from pathlib import Path

from ldt.cluster.gpus import choose_arithmetic
from ldt.dist import SLOWEST_RANK_TIMEOUT, process_group, together
from ldt.errors import InputError
from ldt.evaluation.sets import ScoreJob, score_sets, table
from ldt.files import check_writable_place, unwritable
from ldt.log import append_jsonl


def run(config: ScoreJob) -> int:
    """Score on all ranks together; rank 0 prints and writes the result."""
    output = Path(config.output)

    def check() -> None:
        check_writable_place(output)
        if why := unwritable(output.parent):
            raise InputError(f"{output.parent} can't be written ({why}); give a file of your own as output=")

    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        choose_arithmetic(deterministic=world.device.type == "cuda")
        together(check)
        result = score_sets(config, world)
        if world.rank == 0:
            append_jsonl(output, result)
            print("\n".join(table(result)))
            print(f"{result['images']} images of {config.images}: {output}")
    return 0
