"""From features of generated and of real images to named scores."""

from collections.abc import Sequence

from ldt.data.images import ImageSource
from ldt.data.latent_spec import EXAMPLE_LENGTH
from ldt.errors import InputError
from ldt.metrics.captions import caption_retrieval
from ldt.metrics.detectors import Detector
from ldt.metrics.feature_store import FeatureSet
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.moments import Moments, MomentStream
from ldt.metrics.reference import Reference
from ldt.metrics.set_metrics import (
    cubic,
    gaussian,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from ldt.progress import pluralize

CAPTIONS = "caption_retrieval"
METRICS = ("frechet", "spatial_frechet", "inception_score", "kernel", "mmd_rbf", "mind", "precision_recall", CAPTIONS)
OF_FEATURES = {"kernel", "mmd_rbf", "mind", "precision_recall", CAPTIONS}
"""Metrics of the real images' features themselves, for which moments are not enough."""
NEEDS = {"spatial_frechet": "spatial", "inception_score": "logits"}
LEAST = {"inception_score": 10, "precision_recall": 4}  # images that a metric is defined for, where more than 2
KERNEL_SUBSET = 1000


def check(metrics: list[str], detector: Detector) -> None:
    """Refuse metrics that do not exist, or that this detector has no features for."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"metrics has {metric}, which is not one of {', '.join(METRICS)}")
        if metric in NEEDS and NEEDS[metric] not in detector.outputs:
            raise InputError(
                f"metrics={metric} needs a detector with {NEEDS[metric]}, which {detector.name} does not "
                "have; use detector=inception"
            )
    if not metrics:
        raise InputError(f"metrics is empty; choose from {', '.join(METRICS)}")


def check_counts(metrics: list[str], images: int, what: str) -> None:
    """Refuse sets of fewer images than a metric is defined for."""
    for metric in metrics:
        least = LEAST.get(metric, 2)
        if images < least:
            raise InputError(
                f"{what} has {pluralize(images, 'image', 'images')}, and metrics={metric} needs at least {least}; give "
                "more images or leave it out"
            )


def compute(
    metrics: list[str],
    detector: Detector,
    generated: FeatureSet,
    reference: Reference,
    seed: int,
    asked: Sequence[str] = (),
) -> tuple[dict[str, float], Moments]:
    """The scores by name, and the moments of the generated features. asked: the captions of the generated images."""
    moments = moments_of(generated, "features", detector.outputs["features"])
    scores: dict[str, float] = {}
    if "frechet" in metrics:
        scores[detector.score] = _frechet(moments, reference, "features")
    if "spatial_frechet" in metrics:
        spatial = moments_of(generated, "spatial", detector.outputs["spatial"])
        scores[f"s{detector.score}"] = _frechet(spatial, reference, "spatial")
    if "inception_score" in metrics:
        scores["inception_score"], scores["inception_score_std"] = inception_score(generated.column("logits"))
    if OF_FEATURES & {*metrics}:
        feature_ND, real = generated.column("features"), reference.features()
        size = min(KERNEL_SUBSET, len(feature_ND), len(real))
        for metric, prefix, kernel in (("kernel", "kid", cubic), ("mmd_rbf", "mmd_rbf", gaussian)):
            if metric in metrics:
                name, keys = f"{prefix}_{detector.name}", {"subset_size": size, "seed": seed}
                scores[name], scores[f"{name}_std"] = kernel_distance(feature_ND, real, **keys, kernel=kernel)
        if "mind" in metrics:
            scores[f"mind_{detector.name}"] = monge_distance(feature_ND, real, seed)
        if "precision_recall" in metrics:
            pair = precision_recall(feature_ND, real)
            scores[f"precision_{detector.name}"], scores[f"recall_{detector.name}"] = pair
        if CAPTIONS in metrics:
            found = caption_retrieval(feature_ND, real, asked, reference.captions)
            scores[f"{CAPTIONS}_{detector.name}"], scores[f"{CAPTIONS}_top5_{detector.name}"] = found[:2]
            scores[f"{CAPTIONS}_chance"], scores[f"{CAPTIONS}_top5_chance"] = found[2:]
    return scores, moments


def score_names(detector: Detector) -> tuple[str, ...]:
    """All names that scores can have, for showing them."""
    sets = (f"{kind}_{detector.name}" for kind in ("kid", "mmd_rbf", "mind", "precision", "recall"))
    captions = (
        f"{CAPTIONS}{end}" for end in (f"_{detector.name}", f"_top5_{detector.name}", "_chance", "_top5_chance")
    )
    return detector.score, f"s{detector.score}", "inception_score", *sets, *captions


def captions_of(source: ImageSource, what: str) -> list[str]:
    """Those of all images, as far as the examples of a data set keep them; `InputError` where there are none."""
    if not source.captioned:
        raise InputError(
            f"{what} has no captions, which metrics={CAPTIONS} compares; put x.txt beside x.png, or leave "
            "the metric out"
        )
    return [source.caption(i)[:EXAMPLE_LENGTH] for i in range(len(source))]


def moments_of(generated: FeatureSet, name: str, width: int) -> Moments:
    """Float64 moments of one kind of feature, merged in the order of ids."""
    stream = MomentStream(width)
    for feature_BD in generated.pieces(name):
        stream.add(feature_BD)
    return stream.moments()


def _frechet(moments: Moments, reference: Reference, name: str) -> float:
    real = reference.statistics(name)
    return frechet_distance(moments.mean_D, moments.covariance_DD, real.mean_D, real.covariance_DD)
