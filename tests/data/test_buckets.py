import math
from collections import Counter
from pathlib import Path

import pytest

from studio.data.batches import Samples
from studio.data.buckets import Buckets, Size, cover_box
from studio.data.picture import Picture, PictureSet
from studio.errors import DataError


def picture(width: int, height: int, repeats: int = 1) -> Picture:
    return Picture(Path(f"{width}x{height}.png"), (width, height), "dog", True, repeats=repeats)


def sd(**values: object) -> Buckets:
    return Buckets.around(512, **({"step": 64, "smallest": 256, "largest": 1024} | values))  # type: ignore[arg-type]


def course(sizes: dict[Size, int], *, group: int, seed: int = 0) -> Samples:
    """Return the course of pictures of given numbers in each bucket, all of the bucket's own size."""
    pictures = [picture(*size) for size, number in sizes.items() for _ in range(number)]
    buckets = Buckets(tuple(sorted(sizes)), 8)
    return Samples(
        PictureSet(Path("."), tuple(pictures)), seed=seed, buckets=buckets, num_timesteps=10, group=group
    )


def test_the_buckets_are_the_highest_of_every_width_and_the_same_turned() -> None:
    # By hand: for each multiple of 64 the largest multiple within 512 x 512.
    lying = {
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    }  # fmt: skip
    assert set(sd().sizes) == lying | {(height, width) for width, height in lying} | {(512, 512)}


def test_no_bucket_is_larger_than_the_square_or_out_of_range() -> None:
    for size in sd(smallest=320, largest=768).sizes:
        assert size[0] * size[1] <= 512 * 512 and all(320 <= side <= 768 and side % 64 == 0 for side in size)


def test_the_square_is_always_among_them_and_alone_where_nothing_else_fits() -> None:
    assert Buckets.around(48, step=64, smallest=24, largest=96).sizes == ((48, 48),)
    assert Buckets.around(64, step=64, smallest=32, largest=128).sizes == ((64, 64),)
    assert (100, 100) in Buckets.around(100, step=32, smallest=32, largest=200).sizes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (512, 512)),
        ((72, 64), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1000, 250), (1024, 256)),
        ((10_000, 100), (1024, 256)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_shape(size: Size, bucket: Size) -> None:
    assert sd().fit(picture(*size)) == bucket


def test_small_pictures_keep_their_size_where_they_may_not_be_enlarged() -> None:
    buckets = sd(upscale=False)
    assert buckets.fit(picture(2000, 2000)) == (512, 512)
    assert buckets.fit(picture(300, 200)) == (256, 192)
    assert buckets.fit(picture(520, 400)) == (512, 384)
    with pytest.raises(DataError, match=r"300x60.png \(300 x 60 px\) is smaller than the bucket step of 64"):
        buckets.fit(picture(300, 60))


@pytest.mark.parametrize("along", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", [(512, 512), (576, 448), (256, 1024)])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1001, 333)])
def test_the_cut_part_is_the_largest_of_the_targets_shape(size: Size, target: Size, along: float) -> None:
    left, top, right, bottom = cover_box(size, target, along=along)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert right - left == size[0] or bottom - top == size[1]
    assert math.log((right - left) / (bottom - top) * target[1] / target[0]) == pytest.approx(
        0, abs=0.005
    )  # whole pixels


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_all_samples_of_a_group_are_of_one_size(group: int) -> None:
    samples = course({(16, 16): 5, (32, 8): 3, (8, 32): 1}, group=group)
    for first in range(0, 60 * group, group):
        assert len({samples[index].size for index in range(first, first + group)}) == 1


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_in_as_many_epochs_as_a_group_has_samples_every_picture_is_seen_equally_often(group: int) -> None:
    sizes = {(16, 16): 5, (32, 8): 3, (8, 32): 1}
    samples = course(sizes, group=group)
    seen = Counter(samples[index].picture for index in range(9 * group))
    assert seen == dict.fromkeys(range(9), group)


def test_repeats_are_how_often_an_epoch_holds_a_picture() -> None:
    pictures = (picture(16, 16, repeats=3), picture(16, 16), picture(32, 8, repeats=2))
    found = PictureSet(Path("."), pictures)
    samples = Samples(found, seed=0, buckets=Buckets(((16, 16), (32, 8)), 8), num_timesteps=10, group=1)
    assert found.epoch_size == 6
    for epoch in range(3):
        seen = Counter(samples[6 * epoch + place].picture for place in range(6))
        assert seen == {0: 3, 1: 1, 2: 2}


def test_the_order_can_be_entered_anywhere() -> None:
    sizes = {(16, 16): 7, (32, 8): 4, (8, 32): 2}
    forward = course(sizes, group=3)
    order = [forward[index].picture for index in range(200)]
    for index in (199, 40, 0, 123):
        assert course(sizes, group=3)[index].picture == order[index]
    assert [course(sizes, group=3, seed=1)[index].picture for index in range(200)] != order


def test_buckets_take_turns_in_no_fixed_order() -> None:
    samples = course({(16, 16): 6, (32, 8): 6}, group=2)
    turns = [tuple(samples[12 * epoch + place].size for place in range(0, 12, 2)) for epoch in range(6)]
    assert all(Counter(epoch) == {(16, 16): 3, (32, 8): 3} for epoch in turns)
    assert len(set(turns)) > 1


def test_every_epoch_has_its_share_of_each_buckets_groups() -> None:
    samples = course({(16, 16): 7, (32, 8): 2}, group=4)
    sizes = [samples[4 * group].size for group in range(9 * 5)]
    # After e epochs of 9 samples the first bucket has had floor(7 e / 4) groups, the second floor(2 e / 4).
    for epoch in range(1, 20):
        first, second = 7 * epoch // 4, 2 * epoch // 4
        assert Counter(sizes[: first + second]) == Counter({(16, 16): first, (32, 8): second})
