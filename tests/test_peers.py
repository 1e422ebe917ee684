"""Agreement with other evaluators on the same images and the same (random) Inception: real packages, no snapshots."""

import numpy as np
import pytest
import torch
from peers import peer, random_inception
from safetensors.torch import save_file

from ldt.errors import InputError
from ldt.metrics.detectors import make_detector
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.inception import Inception
from ldt.metrics.moments import Moments
from ldt.metrics.set_metrics import gaussian, inception_score, kernel_distance, precision_recall

IMAGES = 32  # in each of two sets


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def images():
    """Two sets of smooth random images with different colours: uint8 [2, N, 3, 48, 48]."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * IMAGES, 3, 6, 6, generator=g)
    coarse[IMAGES:] = coarse[IMAGES:] * 0.7 + 0.2
    smooth = torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear")
    return (smooth * 255).to(torch.uint8).view(2, IMAGES, 3, 48, 48)


@pytest.fixture(scope="module")
def ours(weights, images):
    """(pooled, spatial, logits) of both sets with TensorFlow's resize."""
    net = Inception(str(weights), "tensorflow", "cpu")
    return [net(x) for x in images]


@pytest.fixture(scope="module")
def synthetic():
    """Features of 600 and 500 images, 64 wide, correlated and not centred."""
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((64, 64)) / 8
    one = generator.standard_normal((600, 64)) @ mix + 0.1
    other = generator.standard_normal((500, 64)) @ mix * 1.2
    return one, other


def frechet(one, other):
    a, b = Moments.of(np.asarray(one)), Moments.of(np.asarray(other))
    return frechet_distance(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)


def test_features_are_torch_fidelitys(weights, images, ours):
    extractor = peer("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    with torch.no_grad():
        pooled, logits = extractor(images[0][:8])
    torch.testing.assert_close(ours[0][0][:8], pooled, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[0][2][:8], logits, rtol=1e-5, atol=1e-5)
    assert ours[0][1].shape == (IMAGES, 7 * 17 * 17) and ours[0][1].std() > 0


def test_spatial_features_have_tensorflows_layout(weights, images):
    """Channel 3 at row 5 and column 11 stands at (5·17 + 11)·7 + 3."""
    net = Inception(str(weights), "tensorflow", "cpu")
    kept = {}
    net.net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: kept.setdefault("map", o))
    _, spatial, _ = net(images[0][:1])
    assert spatial[0, (5 * 17 + 11) * 7 + 3] == kept["map"][0, 3, 5, 11]


def test_features_are_pytorch_fids_in_its_resize(weights, images, monkeypatch):
    inception = peer("pytorch_fid.inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: torch.load(weights, weights_only=True))
    theirs = inception.InceptionV3([3]).eval()
    with torch.no_grad():
        expected = theirs(images[0][:8].float() / 255)[0].flatten(1)
    pooled, _, _ = Inception(str(weights), "bilinear", "cpu")(images[0][:8])
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_clean_fids_in_its_resize(images):
    from ldt.metrics.inception import RESIZE

    resizer = peer("cleanfid.resize").build_resizer("clean")
    expected = np.stack([resizer(x.permute(1, 2, 0).numpy()) for x in images[0][:8]])
    ours = RESIZE["clean"](images[0][:8]) * 128 + 128
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-6, atol=1e-4)


def test_resize_modes_differ(weights, images):
    features = [Inception(str(weights), r, "cpu")(images[0][:2])[0] for r in ("tensorflow", "bilinear", "clean")]
    assert not torch.allclose(features[0], features[1], rtol=1e-3)
    assert not torch.allclose(features[0], features[2], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # of pytorch-fid and clean-fid
def test_frechet_is_everybodys(synthetic):
    one, other = synthetic
    value = frechet(one, other)
    fidelity = peer("torch_fidelity.metric_fid")
    a, b = (fidelity.fid_features_to_statistics(torch.from_numpy(x)) for x in synthetic)
    expected = fidelity.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(expected, rel=1e-6)
    metrics = peer("torchmetrics.image.fid")
    tensors = [torch.from_numpy(x) for x in (one.mean(0), np.cov(one.T), other.mean(0), np.cov(other.T))]
    assert value == pytest.approx(float(metrics._compute_fid(*tensors)), rel=1e-6)
    score = peer("pytorch_fid.fid_score")
    statistics = (one.mean(0), np.cov(one.T), other.mean(0), np.cov(other.T))
    assert value == pytest.approx(score.calculate_frechet_distance(*statistics), rel=1e-4)
    assert value == pytest.approx(peer("cleanfid.fid").frechet_distance(*statistics), rel=1e-4)


def test_fid_of_the_images_is_torch_fidelitys(ours):
    """From features on: fewer images than features, so both covariances are singular."""
    fidelity = peer("torch_fidelity.metric_fid")
    one, other = (x[0].double() for x in ours)
    a, b = (fidelity.fid_features_to_statistics(x) for x in (one, other))
    expected = fidelity.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert frechet(one, other) == pytest.approx(expected, rel=1e-6)


def test_inception_score_is_torch_fidelitys(ours):
    logits = torch.cat([ours[0][2], ours[1][2]])
    theirs = peer("torch_fidelity.metric_isc").isc_features_to_metric(logits, splits=10, shuffle=False)
    score = inception_score(logits.numpy())
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert score.std == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    assert score.mean != pytest.approx(inception_score(logits.flip(0).numpy()).mean, rel=1e-9), "order matters"


def test_kernel_distance_is_torch_fidelitys(synthetic):
    """On the whole sets, where which subset is drawn does not matter."""
    one, other = (x[:500] for x in synthetic)
    theirs = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        *map(torch.from_numpy, (one, other)), kid_subsets=1, kid_subset_size=500, verbose=False
    )
    ours = kernel_distance(one, other, subsets=1, subset_size=500)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    subsets = kernel_distance(one, other, subsets=50, subset_size=100)
    assert abs(subsets.mean - ours.mean) < 4 * subsets.std / 50**0.5


def test_the_gaussian_mmd_is_torch_fidelitys(synthetic):
    """On the whole sets, where which subset is drawn does not matter."""
    one, other = (x[:500] * 5 for x in synthetic)
    theirs = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        *map(torch.from_numpy, (one, other)),
        kid_subsets=1,
        kid_subset_size=500,
        kid_kernel="rbf",
        kid_kernel_rbf_sigma=10.0,
        verbose=False,
    )
    ours = kernel_distance(one, other, subsets=1, subset_size=500, kernel=gaussian)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys(synthetic):
    one, other = (x.astype(np.float32) for x in synthetic)
    theirs = peer("torch_fidelity.metric_prc").prc_features_to_metric(
        *map(torch.from_numpy, (one, other)), prc_neighborhood=3, prc_batch_size=200, save_cpu_ram=False, verbose=False
    )
    ours = precision_recall(one, other)
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_inception_score_of_known_distributions():
    """One class for all images scores 1; each image sure of another of C classes scores C."""
    logits = np.zeros((40, 4))
    assert inception_score(logits, splits=2).mean == pytest.approx(1)
    assert inception_score(60 * np.eye(4)[np.arange(40) % 4], splits=2).mean == pytest.approx(4)


def test_bad_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="detector weights nowhere.pth do not exist"):
        Inception("nowhere.pth", "tensorflow", "cpu")
    (tmp_path / "w.pth").write_bytes(b"no weights at all")
    with pytest.raises(InputError, match="w.pth are not a file of tensors"):
        Inception(str(tmp_path / "w.pth"), "tensorflow", "cpu")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not those of Inception for FID"):
        Inception(str(tmp_path / "other.pth"), "tensorflow", "cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inception_score(np.zeros((5, 3))), "an Inception Score over 10 splits needs at least as many images"),
        (lambda: kernel_distance(np.zeros((5, 3)), np.zeros((9, 3))), "a kernel distance over subsets of 1000"),
        (lambda: precision_recall(np.zeros((3, 3)), np.zeros((9, 3))), "precision and recall with 3 neighbours"),
    ],
)
def test_too_few_images_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_timm_model_is_a_detector(images, tmp_path):
    """By name with a local file: the same features as timm gives on pixels prepared by Pillow-free arithmetic."""
    timm = peer("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    detector = make_detector("timm", weights=str(tmp_path / "weights.safetensors"), model="resnet10t")
    assert (detector.score, detector.outputs) == ("fd_resnet10t", {"features": 512})
    image_BCHW = images[0][:4]
    large = torch.nn.functional.interpolate(image_BCHW.float(), (176, 176), mode="bicubic", antialias=True)
    x = (large.clamp(0, 255) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    ours = detector(image_BCHW.permute(0, 2, 3, 1)).feature_BD
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="model=resnet9000 is not a model of timm"):
        make_detector("timm", weights="x", model="resnet9000")
    with pytest.raises(InputError, match="are not those of resnet18"):
        make_detector("timm", weights=str(tmp_path / "weights.safetensors"), model="resnet18")
