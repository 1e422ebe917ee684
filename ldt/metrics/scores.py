"""From features of generated and of real images to named scores."""

from ldt.errors import InputError
from ldt.metrics.detectors import Detector
from ldt.metrics.feature_store import FeatureStore
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.moments import Moments, MomentStream
from ldt.metrics.reference import Reference
from ldt.metrics.set_metrics import inception_score, kernel_distance, precision_recall

METRICS = ("frechet", "spatial_frechet", "inception_score", "kernel", "precision_recall")
NEEDS = {"spatial_frechet": "spatial", "inception_score": "logits"}
KERNEL_SUBSET = 1000


def check(metrics: list[str], detector: Detector) -> None:
    """Refuse metrics that do not exist, or that this detector has no features for."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"evaluate.metrics has {metric}, which is not one of {', '.join(METRICS)}")
        if metric in NEEDS and NEEDS[metric] not in detector.outputs:
            raise InputError(
                f"evaluate.metrics={metric} needs a detector with {NEEDS[metric]}, which {detector.name} does not "
                "have; use evaluate.detector=inception"
            )
    if not metrics:
        raise InputError(f"evaluate.metrics is empty; choose from {', '.join(METRICS)}")


def compute(
    metrics: list[str], detector: Detector, store: FeatureStore, blocks: int, reference: Reference, seed: int
) -> tuple[dict[str, float], Moments]:
    """The scores by name, and the moments of the generated features."""
    moments = moments_of(store, blocks, "features", detector.outputs["features"])
    scores: dict[str, float] = {}
    if "frechet" in metrics:
        scores[detector.score] = _frechet(moments, reference, "features")
    if "spatial_frechet" in metrics:
        spatial = moments_of(store, blocks, "spatial", detector.outputs["spatial"])
        scores[f"s{detector.score}"] = _frechet(spatial, reference, "spatial")
    if "inception_score" in metrics:
        scores["inception_score"], scores["inception_score_std"] = inception_score(store.column("logits", blocks))
    if "kernel" in metrics or "precision_recall" in metrics:
        generated, real = store.column("features", blocks), reference.features()
        if "kernel" in metrics:
            size = min(KERNEL_SUBSET, len(generated), len(real))
            kernel = f"kid_{detector.name}"
            scores[kernel], scores[f"{kernel}_std"] = kernel_distance(generated, real, subset_size=size, seed=seed)
        if "precision_recall" in metrics:
            pair = precision_recall(generated, real)
            scores[f"precision_{detector.name}"], scores[f"recall_{detector.name}"] = pair
    return scores, moments


def score_names(detector: Detector) -> tuple[str, ...]:
    """All names that scores can have, for showing them."""
    sets = (f"{kind}_{detector.name}" for kind in ("kid", "precision", "recall"))
    return detector.score, f"s{detector.score}", "inception_score", *sets


def moments_of(store: FeatureStore, blocks: int, name: str, width: int) -> Moments:
    """Float64 moments of one array, merged in the order of ids."""
    stream = MomentStream(width)
    for arrays in store.read(blocks):
        stream.add(arrays[name])
    return stream.moments()


def _frechet(moments: Moments, reference: Reference, name: str) -> float:
    real = reference.statistics(name)
    return frechet_distance(moments.mean_D, moments.covariance_DD, real.mean_D, real.covariance_DD)
