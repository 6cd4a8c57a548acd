"""Label maps: their files, how they follow their images, and what a batch of them is trained on."""
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, RandAugment
from torchvision.ops import roi_align

import datasets
from tasks.classification import token_labels
from tasks.classification.token_labels import TokenLabelMixup, TokenLabelTransform, TokenTargets, read_label_map
from training.data.loader import seeded
from utils import UserError


def whole(count, cells, tokens):
    """(count, side, side, 2): the points of whole maps of cells x cells for images of tokens x tokens."""
    side = tokens * -(-cells // tokens)
    steps = (2 * torch.arange(side) + 1) / side - 1
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).expand(count, side, side, 2)


def published_file(path, scores, classes):
    """A map as the published ones are written: scores over class indices, both in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.stack([scores.half(), classes.half()]), path)


def positions(height, width):
    """(3, height, width): x, y and 1 at the centre of each cell; both sides run from 0 to 1."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


def position_image(height, width):
    return Image.fromarray((255 * positions(height, width)).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture
def position_map(tmp_path):
    """A map that says at every position where it is: class 0 is x, class 1 is y, class 2 is 1."""
    classes = torch.arange(3)[:, None, None].expand(3, 40, 60)
    published_file(tmp_path / "map.pt", positions(40, 60), classes)
    return tmp_path / "map.pt"


# --- files ------------------------------------------------------------------------------------------------------------


def test_reads_a_published_file(tmp_path):
    scores, classes = torch.randn(5, 18, 18).sort(dim=0, descending=True).values, torch.randint(1000, (5, 18, 18))
    published_file(tmp_path / "a.pt", scores, classes)
    label_map = read_label_map(tmp_path / "a.pt", 1000)
    assert label_map.shape == (2, 5, 18, 18) and label_map.dtype == torch.float16
    assert torch.equal(label_map[0], scores.half()) and torch.equal(label_map[1].long(), classes)


def test_class_indices_beyond_float16(tmp_path):
    torch.save(torch.full((2, 1, 2, 2), 21841.0), tmp_path / "a.pt")
    assert read_label_map(tmp_path / "a.pt", 21842)[1].eq(21841).all()


class Foreign:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no such label map; make it by scripts/make_label_maps.py"),
        (b"", "damaged one; remove it, and make it by"),
        (pickle.dumps(Foreign(), 2), "not a label map"),
        (torch.zeros(2, 5, 18), r"a label map is a tensor \(2, k, h, w\), this is \(2, 5, 18\)"),
        (torch.zeros(3, 5, 2, 2), r"this is \(3, 5, 2, 2\)"),
        (dict(a=torch.zeros(1)), "this is dict"),
        (torch.full((2, 5, 2, 2), 3.0), "no class index below 3"),
        (torch.full((2, 5, 2, 2), -1.0), "no class index below 3"),
        (torch.full((2, 5, 2, 2), torch.nan), "not finite"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message, capfd):
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        read_label_map(path, 3)
    assert str(path) in str(error.value) and "executed" not in capfd.readouterr().out


# --- a map follows its image ------------------------------------------------------------------------------------------


def follow(position_map, tokens=4, edit=lambda steps: None, **augmentation):
    """Tokens' colours in a transformed image of positions, and the scores of the map that went along."""
    transform = datasets.build_transform(
        train=True, input_size=32 * tokens, mean=(0, 0, 0), std=(1, 1, 1), color_jitter=0, **augmentation
    )
    edit(transform.transforms)
    transform = TokenLabelTransform(transform, 3, (2, 3, 40, 60), 32)
    image, label_map, points = transform((position_image(160, 240), position_map))
    colours = torch.nn.functional.avg_pool2d(image.float() / 255, 32)
    return colours, TokenTargets(label_map[None], points[None]).scores(3, tokens, tokens)[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_map_follows_crop_and_flip(position_map, seed):
    with seeded(seed):
        colours, scores = follow(position_map, hflip=0.5, scale=(0.1, 1.0), ratio=(0.5, 2.0))
    torch.testing.assert_close(scores, colours, atol=0.012, rtol=0)


def test_the_seeds_above_flip_some_images(position_map):
    """x falls from left to right in an image that was flipped."""
    falls = []
    for seed in range(6):
        with seeded(seed):
            _, scores = follow(position_map, hflip=0.5, scale=(0.1, 1.0), ratio=(0.5, 2.0))
        falls.append(bool(scores[0, 0, 0] > scores[0, 0, -1]))
    assert any(falls) and not all(falls)


@pytest.mark.parametrize("policy", ["rand-m9-n2", "original"])
@pytest.mark.parametrize("name", sorted(token_labels.GEOMETRIC))
def test_a_map_follows_geometric_augmentation(position_map, name, policy):
    """Twice the same operation at full strength; what it uncovers is 0 in the image, and in the scores."""

    def only_this_one(steps):
        (step,) = (step for step in steps if hasattr(step, "ops") or hasattr(step, "policy"))
        hparams = dict(translate_const=30, img_mean=(0, 0, 0), interpolation=Image.BILINEAR)
        operations = [AugmentOp(name, prob=1.0, magnitude=8, hparams=hparams) for _ in range(2)]
        if isinstance(step, RandAugment):
            step.ops, step.num_layers = operations, 2
        else:
            step.policy = [operations]

    with seeded(1):
        colours, scores = follow(position_map, edit=only_this_one, auto_augment=policy, scale=(0.5, 0.9), hflip=1.0)
    torch.testing.assert_close(scores, colours, atol=0.08, rtol=0)  # a token reads few points of such a border
    assert (scores - colours).abs().mean() < 0.008
    if name != "Rotate":
        assert colours[2].min() < 0.9, "nothing was uncovered"


def test_all_geometric_operations_of_timm_are_known():
    """An operation that says where pixels come from, rather than read them, moves them."""
    moving = set()
    for name in NAME_TO_OP:
        try:
            out = AugmentOp(name, prob=1.0, magnitude=9)(token_labels._Probe((32, 32)))
        except (AttributeError, TypeError, AssertionError, ValueError):
            continue
        if isinstance(out, np.ndarray):
            moving.add(name)
    assert moving == token_labels.GEOMETRIC


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_images_are_those_of_training_without_maps(position_map, interpolation):
    settings = dict(train=True, input_size=64, mean=(0.5,) * 3, std=(1,) * 3, auto_augment="rand-m9-mstd0.5-inc1",
                    interpolation=interpolation)
    plain = datasets.build_transform(**settings)
    labelled = TokenLabelTransform(datasets.build_transform(**settings), 3, (2, 3, 40, 60), 32)
    image = position_image(160, 240)
    for seed in range(8):
        with seeded(seed):
            expected = plain(image)
        with seeded(seed):
            assert torch.equal(labelled((image, position_map))[0], expected)


def test_a_copy_in_a_spawned_worker_follows_too(position_map):
    settings = dict(mean=(0,) * 3, std=(1,) * 3, auto_augment="rand-m9-n20")
    transform = datasets.build_transform(train=True, input_size=64, **settings)
    transform = TokenLabelTransform(transform, 3, (2, 3, 40, 60), 32)
    copy = pickle.loads(pickle.dumps(transform))
    found = []
    for each in (transform, copy):
        with seeded(3):
            found.append(each((position_image(160, 240), position_map))[2])
    assert torch.equal(*found) and len(copy.trace) > 2


def test_maps_of_another_size_are_refused(position_map):
    transform = datasets.build_transform(train=True, input_size=64, mean=(0,) * 3, std=(1,) * 3)
    transform = TokenLabelTransform(transform, 3, (2, 3, 18, 18), 32)
    with pytest.raises(UserError, match=r"is \(2, 3, 40, 60\), and other label maps are \(2, 3, 18, 18\)"):
        transform((position_image(20, 20), position_map))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 18, 12), (2, 5, 7, 6)])
def test_scores_are_roi_align(tmp_path, box, flip):
    """Of the dense map, with zeros for the classes that are left out, at non-square sizes."""
    rows, cols, height, width = 3, 2, 18, 12
    scores, classes = torch.randn(1, 5, height, width), torch.rand(1, 9, height, width).topk(5, dim=1).indices
    dense = torch.zeros(1, 9, height, width)
    for k in range(5):
        for y in range(height):
            for x in range(width):
                dense[0, classes[0, k, y, x], y, x] = scores[0, k, y, x]
    top, left, tall, wide = box
    corners = torch.tensor([[0.0, left, top, left + wide, top + tall]])
    expected = roi_align(dense, corners, (rows, cols), sampling_ratio=6, aligned=True)

    transform = datasets.build_transform(train=True, input_size=(32 * rows, 32 * cols), mean=(0,) * 3, std=(1,) * 3)
    transform = TokenLabelTransform(transform, 9, (2, 5, height, width), 32)
    transform.trace = [token_labels._crop_matrix(*box, (width, height))] + [token_labels._MIRROR] * flip
    targets = TokenTargets(torch.stack([scores, classes.float()], dim=1), transform._points()[None])
    found = targets.scores(9, rows, cols)
    torch.testing.assert_close(found, expected.flip(3) if flip else expected, atol=1e-5, rtol=1e-5)


def test_the_data_set_without_maps_stays_as_it_is(position_map):
    """And the one with maps has its own count of bad images."""
    root = position_map.parent
    (root / "train" / "a").mkdir(parents=True)
    position_image(160, 240).save(root / "train" / "a" / "map.png")
    (root / "a").mkdir()
    position_map.rename(root / "a" / "map.pt")
    transform = datasets.build_transform(
        train=True, input_size=64, mean=(0,) * 3, std=(1,) * 3, auto_augment="rand-m9-n20"
    )
    plain = datasets.build_dataset("image_folder", root, "train", transform, on_error="next")
    expected, target = plain[0, 7]
    labelled = token_labels.add_label_maps(plain, root, 3, 32)
    image, label_map, points = labelled[0, 7][0]
    assert torch.equal(image, expected) and label_map.shape == (2, 3, 40, 60) and points.shape[2] == 2
    assert labelled.classes == ["a"] and labelled.on_error == "next" and target == 0
    traced = len(labelled.transform.trace)
    assert plain.transform is transform and torch.equal(plain[0, 7][0], expected)
    assert len(labelled.transform.trace) == traced > 2
    (root / "train" / "a" / "map.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        labelled[0]
    assert (labelled.bad_images.tolist(), plain.bad_images.tolist()) == ([True], [False])
    assert labelled.name(0) == str(root / "train" / "a" / "map.png")


# --- mixing -----------------------------------------------------------------------------------------------------------


def batch_of(count, classes=7, size=128):
    """Images of one grey each, and maps that are sure of one class each: image and class i + 1."""
    images = torch.arange(1.0, count + 1)[:, None, None, None].expand(count, 3, size, size).clone()
    maps = torch.stack([torch.full((count, 1, 6, 6), 50.0), images[:, :1, :6, :6]], dim=1)
    return images, TokenTargets(maps, whole(count, 6, size // 32))


def test_without_mixing():
    images, targets = batch_of(3)
    mixed, (labels, tokens) = TokenLabelMixup(7, 0.1, 32)(images.clone(), targets)
    assert torch.equal(mixed, images) and tokens.shape == (3, 4, 4, 7)
    expected = torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), 7) * 0.9 + 0.1 / 7
    torch.testing.assert_close(labels, expected)
    torch.testing.assert_close(tokens, expected[:, None, None].expand_as(tokens))


def test_the_softmax_comes_after_the_mean():
    """As published: an image's label is the softmax of its mean scores, and not the mean of its tokens' labels."""
    maps = torch.stack([torch.randn(1, 4, 8, 8), torch.arange(4.0)[None, :, None, None].expand(1, 4, 8, 8)], dim=1)
    targets = TokenTargets(maps, whole(1, 8, 2))
    _, (labels, tokens) = TokenLabelMixup(4, 0.0, 32)(torch.zeros(1, 3, 64, 64), targets)
    scores = maps[:, 0].unflatten(3, (2, 4)).unflatten(2, (2, 4))
    torch.testing.assert_close(tokens, scores.mean(dim=(3, 5)).softmax(dim=1).permute(0, 2, 3, 1))
    torch.testing.assert_close(labels, scores.mean(dim=(2, 3, 4, 5)).softmax(dim=1))
    assert (labels - tokens.mean(dim=(1, 2))).abs().max() > 1e-4


def test_cutmix_gives_every_token_one_image_and_its_label():
    np.random.seed(0)
    mixup = TokenLabelMixup(7, 0.0, 32, cutmix=1.0)
    shares = set()
    for _ in range(30):
        images, targets = batch_of(4)
        mixed, (labels, tokens) = mixup(images.clone(), targets)
        blocks = mixed.unflatten(3, (4, 32)).unflatten(2, (4, 32))[:, 0].permute(0, 1, 3, 2, 4).flatten(3)
        assert torch.equal(blocks.amin(3), blocks.amax(3)), "a box cuts through a token"
        assert torch.equal(tokens.argmax(dim=3).float(), blocks[..., 0])
        torch.testing.assert_close(labels, tokens.mean(dim=(1, 2)))
        shares.add(round(float(labels[0, 1]), 4))
    assert len(shares) > 5 and min(shares) < 0.5


def test_mixup_mixes_labels_as_images():
    np.random.seed(0)
    images, targets = batch_of(4)
    mixed, (labels, tokens) = TokenLabelMixup(7, 0.0, 32, mixup=0.8)(images.clone(), targets)
    share = float(labels[0, 1])
    assert 0 < share < 1 and float(labels[0, 4]) == pytest.approx(1 - share)
    torch.testing.assert_close(mixed, images * share + images.flip(0) * (1 - share))
    torch.testing.assert_close(tokens, labels[:, None, None].expand_as(tokens))


def test_mixing_is_as_often_as_timms():
    """The same draws: what is mixed, and by how much, follows from the same flags."""
    settings = dict(prob=0.7, switch_prob=0.4, num_classes=7, label_smoothing=0.1)
    timms = Mixup(0.8, 1.0, **settings)
    ours = TokenLabelMixup(7, 0.1, 32, 0.8, 1.0, prob=0.7, switch_prob=0.4)
    for seed in range(5):
        np.random.seed(seed)
        expected = timms._params_per_batch()
        np.random.seed(seed)
        assert ours._params_per_batch() == expected


def test_a_batch_in_page_locked_memory_and_elsewhere():
    labelled = torch.zeros(3, 4, 4), torch.ones(2, 1, 2, 2), torch.ones(2, 2, 2)
    images, targets = token_labels.collate([(labelled, 0)] * 2)
    assert images.shape == (2, 3, 4, 4) and targets.maps.shape == (2, 2, 1, 2, 2)
    moved = targets.to(device=torch.device("meta"), non_blocking=True)
    assert moved.maps.device.type == moved.points.device.type == "meta"
    if torch.cuda.is_available():
        assert targets.pin_memory().maps.is_pinned()
