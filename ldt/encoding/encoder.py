"""Encode images into latent shards: posterior moments, labels and a manifest.

Runs on one process or many (torchrun, srun): each output shard is a unit of its own, so any number of processes give
the same files, and running the command again after a stop or a kill goes on with the shards that are missing.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldt import log
from ldt.data.prefetch import prefetch
from ldt.data.shard_files import HEAD, RECIPE, VALIDATION
from ldt.data.shards import mds
from ldt.data.shards.manifest import Manifest, make_table, read_head
from ldt.data.shards.shard_writer import Origin, ShardWriter, Sidecar, read_sidecar, shard_name, sidecar_path
from ldt.data.shards.statistics import Sums
from ldt.dist import World, on_rank_zero, together
from ldt.encoding.config import EncodeJob
from ldt.encoding.encoded import EncodedBatch, blocks, first_not_finite, pack
from ldt.encoding.plan import NAMES, Plan, Unit
from ldt.errors import InputError, RunError, by_reason
from ldt.files import UNFINISHED, hash_of, parse_json, remove_unfinished, write_atomic
from ldt.models.text_encoder import describe
from ldt.progress import pluralize

logger = log.get_logger(__name__)
LEFT_OUT = "left_out.jsonl"  # images that could not be read, and why


class Encoder:
    """This rank's part of the work, and rank 0's before and after it.

    plan, output: of one bucket; by default those of the whole job.
    """

    def __init__(
        self, config: EncodeJob, world: World, plan: Plan | None = None, output: str | Path | None = None
    ) -> None:
        self.config, self.world, self.output = config, world, Path(output or config.output)
        self.plan = plan or Plan.of(config, world)

    def run(self) -> None:
        complete = on_rank_zero(self.world, self._claim_output)
        if not complete:
            undone = on_rank_zero(self.world, lambda: [u for u in self.plan.units() if not self._is_done(u)])
            if self.world.rank == 0:
                self._announce(len(undone))
            together(lambda: self._encode_or_say(undone[self.world.rank :: self.world.size]))
            on_rank_zero(self.world, self._finish)
        if self.world.rank == 0:
            self._report(complete)

    def _is_done(self, unit: Unit) -> bool:
        """Whether the unit's shard is there and was made from the files as they are now."""
        sidecar = self._sidecar(unit)
        return sidecar is not None and sidecar.source == self.plan.source_hash(unit)

    def _announce(self, undone: int) -> None:
        """Log what is going to be encoded: a wrong directory should be noticed before hours are spent on it."""
        units, images = self.plan.units(), self.plan.source
        done = len(units) - undone
        logger.info(
            "%s in %s into %s of %s%s",
            pluralize(len(images), "image", "images"),
            pluralize(len(images.classes), f"class ({images.classes[0]})", f"classes ({images.classes[0]}, …)"),
            pluralize(len(units), "shard", "shards"),
            "×".join(map(str, self.plan.layout.latent_shape)),
            f"; {done:,} are there" if done else "",
        )
        if self.plan.text and images.captioned < len(images):
            logger.warning("%s of %s images have a caption", f"{images.captioned:,}", f"{len(images):,}")
        say_left_out(self.output, self.plan.input.unreadable)
        for remark in images.remarks():
            logger.warning("%s", remark)

    def _encode_or_say(self, units: list[Unit]) -> None:
        """Encode, and log a failure at once: the other ranks may need hours until they learn of it."""
        try:
            self._encode(units)
        except (InputError, RunError) as error:
            if self.world.size > 1:
                logger.error("%s", error)
            raise

    def _claim_output(self) -> bool:
        """Return whether the output is complete already; else take possession of it, or refuse what is there."""
        marker = self.output / RECIPE
        if (self.output / HEAD).exists():
            head = read_head(self.output)
            self._compare(head["recipe"])
            if "source" in head and head["source"] != self.plan.whole_source_hash():
                raise InputError(
                    f"output={self.output} was encoded from {self.plan.input.path}, whose files have other sizes now; "
                    "choose another output, or delete it and encode again"
                )
            self._clean_up()
            return True
        if marker.exists():
            try:
                recipe = dict(parse_json(marker.read_bytes()))
            except (ValueError, TypeError):
                raise InputError(f"{marker} is damaged; remove {self.output} and encode again") from None
            self._compare(recipe)
        elif self.output.exists() and (not self.output.is_dir() or _others(self.output)):
            raise InputError(f"output={self.output} already holds other files; choose an empty or a new directory")
        self._make(self.output)
        write_atomic(marker, json.dumps(self.plan.recipe(), indent=1).encode())  # first: by it the output is ours
        if self.plan.split.validation_samples:
            self._make(self.output / VALIDATION)
        write_left_out(self.output, self.plan.input.unreadable)
        return False

    def _make(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise by_reason(
                f"output={self.output} can't be made ({error.strerror}); choose another place", error
            ) from None

    def _compare(self, other: dict[str, Any]) -> None:
        mine, other = self.plan.recipe(), {"tf32": False} | other  # which older encodings did not say
        if NAMES not in other:  # written before names were looked at
            del mine[NAMES]
        keys = [*mine, *(k for k in other if k not in mine)]
        changed = [
            f"{k}: {_short(other.get(k))} there, {_short(mine.get(k))} now" for k in keys if mine.get(k) != other.get(k)
        ]
        if changed:
            raise InputError(
                f"output={self.output} was encoded with other settings ({'; '.join(changed)}); "
                "choose another output or delete it"
            )

    def _encode(self, units: list[Unit]) -> None:
        """Decode ahead in threads, encode, and write each finished shard in a thread of its own."""
        batches = [
            (u, i, min(i + self.config.batch, u.stop)) for u in units for i in range(u.start, u.stop, self.config.batch)
        ]
        total = sum(u.stop - u.start for u in units)
        bar = log.progress(total, "img", "encode", show=self.world.rank == 0)
        encoded: list[EncodedBatch] = []  # of the shard that is being filled
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(self.config.threads) as readers, ThreadPoolExecutor(1) as writer:
            for (unit, _, stop), loaded in prefetch(readers, self.plan.load, batches, 2 * self.config.threads):
                encoded.append(self.plan.encode(loaded))
                bar.update(len(loaded.labels))
                if stop == unit.stop:
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self.write_shard, unit, encoded)
                    encoded = []
            if writing is not None:
                writing.result()

    def write_shard(self, unit: Unit, encoded: list[EncodedBatch]) -> None:
        """Round, check and write one shard; runs in the writer's thread."""
        plan, format = self.plan, self.config.format
        samples, sums = pack(encoded, plan.layout), []
        for number, view in enumerate(samples.views):
            for start, block in blocks(view, plan.layout):
                bad = first_not_finite(block)
                if bad is not None:
                    given = torch.cat([batch.moments[number] for batch in encoded])[start + bad]
                    raise InputError(self._not_finite(unit, start + bad, given))
                sums.append(Sums.of(block, self.config.whitening == "element"))
        for target_n in (samples.target_n, samples.target_flipped_n):
            bad = None if target_n is None else first_not_finite(target_n)
            if bad is not None:
                name = plan.source.name(plan.image_numbers(unit, unit.start, unit.stop)[bad])
                raise InputError(f"target={self.config.target} of image {name} is not finite in fp16; choose another")
        counts = plan.caption_counts([caption for batch in encoded for caption in batch.captions])
        writer = ShardWriter(self.output / unit.part, format, plan.layout, len(plan.source.classes))
        source = hash_of(line for batch in encoded for line in batch.files)
        origin = Origin(unit.start, source, counts)
        writer.write(shard_name(unit.number, format), samples, Sums.total(sums), origin)

    def _not_finite(self, unit: Unit, at: int, given: torch.Tensor) -> str:
        """Sample `at` of a unit has been stored with infinities or NaN; `given` is what the autoencoder made of it."""
        start = unit.start + at
        name = self.plan.source.name(self.plan.image_numbers(unit, start, start + 1)[0])
        if bool(torch.isfinite(given).all()):
            return f"the latent of image {name} is not finite in {self.config.dtype}; use dtype=fp32"
        return (
            f"the latent of image {name} is not finite as it comes; check the file or the autoencoder that it comes "
            "from"
        )

    def _sidecar(self, unit: Unit) -> Sidecar | None:
        return read_sidecar(self.output / unit.part, shard_name(unit.number, self.config.format))

    def _finish(self) -> None:
        """Assert that every sample is there once, then write the manifests, the training one last."""
        units = self.plan.units()
        sidecars = {u: self._sidecar(u) for u in units}
        for unit, sidecar in sidecars.items():
            if sidecar is None or sidecar.samples != unit.stop - unit.start:
                raise RunError(f"shard {unit.number} of {self.output / unit.part} has vanished; run the command again")
        done = [(u, s) for u, s in sidecars.items() if s is not None]
        training = [s for u, s in done if not u.part]
        whitening = Sums.total(s.sums for s in training).facts(self.plan.layout.latent_shape)  # for both splits
        held_out = [s for u, s in done if u.part]
        if held_out:
            self._save_manifest(self.output / VALIDATION, held_out, whitening, "")
        self._save_manifest(self.output, training, whitening, hash_of(s.source for _, s in done))
        self._clean_up()

    def _save_manifest(self, directory: Path, sidecars: list[Sidecar], whitening: dict[str, Any], source: str) -> None:
        config = self.config
        if config.format == "mds":
            columns = ([s.name for s in sidecars], [s.bytes for s in sidecars], [s.samples for s in sidecars])
            index = mds.library_index(*columns, [s.xxh64 for s in sidecars], self.plan.layout)
            write_atomic(directory / "index.json", index)
        Manifest(
            format=config.format,
            latent_shape=self.plan.layout.latent_shape,
            dtype=config.dtype,
            flips=config.flips,
            classes=list(self.plan.source.classes),
            class_counts=np.sum([s.class_counts for s in sidecars], axis=0).tolist(),
            **whitening,
            autoencoder=config.autoencoder,
            autoencoder_hash=self.plan.autoencoder.hash,
            image_size=self.plan.input.size.height,
            image_channels=self.plan.autoencoder.image_channels,
            table=make_table([s.row for s in sidecars]),
            recipe=self.plan.recipe(),
            captions=self.plan.text is not None,
            posterior=self.plan.layout.posterior,
            target=self.plan.target(),
            text=describe(self.plan.text) | {"examples": self.plan.examples()} if self.plan.text else {},
            caption_counts={k: sum(s.captions[k] for s in sidecars) for k in self.plan.caption_counts([])},
            source=source,
        ).save(directory)

    def _clean_up(self) -> None:
        """Remove what only an unfinished encoding needs."""
        for unit in self.plan.units():
            name = shard_name(unit.number, self.config.format)
            sidecar_path(self.output / unit.part, name).unlink(missing_ok=True)
        for directory in {self.output / u.part for u in self.plan.units()}:
            remove_unfinished(directory)
        (self.output / RECIPE).unlink(missing_ok=True)

    def _report(self, complete: bool) -> None:
        training, held_out = self.plan.split.training_samples, self.plan.split.validation_samples
        print(f"{training:,} training and {held_out:,} held-out images{' were already' if complete else ''} encoded")
        for part, directory in (("training", self.output), ("held-out", self.output / VALIDATION)):
            counts = read_head(directory).get("caption_counts") if (directory / HEAD).exists() else None
            if counts:
                print(
                    f"{part} captions: {counts['captioned']:,} images have one, {counts['empty']:,} have none or "
                    f"an empty one, {counts['cut']:,} are cut at text.length={self.config.text.length}"
                )
        if self.config.images.buckets:
            return
        size, classes = self.plan.input.size.height, len(self.plan.source.classes)
        example = f"imagenet{size}/ldt_transformer" if size in (256, 512) and classes >= 1000 else "fashion_mnist"
        example = "text/emoji" if self.plan.text else example
        print(
            f"next: ldt inspect {self.output} grid=grid.png; ldt train configs/{example}.yaml data.path={self.output}"
        )
        print(f"latent shards: {self.output}")


def write_left_out(output: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """Note the names of images that are left out, and why."""
    lines = [json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in unreadable]
    if lines:
        write_atomic(output / LEFT_OUT, "".join(lines).encode())


def say_left_out(output: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """Warn of images that are left out."""
    if unreadable:
        images = pluralize(len(unreadable), "image", "images")
        logger.warning("left out: %s, named with the reasons in %s", images, output / LEFT_OUT)


def _others(directory: Path) -> bool:
    """Whether a directory holds anything that no encoding which was killed at its very beginning has left."""
    return any(not path.name.endswith(UNFINISHED) for path in directory.iterdir())


def _short(value: Any) -> str:
    """A setting in a message; a thousand class names are as many as their number says."""
    if isinstance(value, list) and len(value) > 5:
        return f"{len(value):,} from {value[0]!r} to {value[-1]!r}"
    return repr(value)
