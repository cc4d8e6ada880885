"""Which picture each sample of a run shows, when all pictures of one optimizer step must be of one size."""

import bisect
from collections.abc import Callable, Mapping, Sequence

import torch

from studio.data.buckets import Size


class Order:
    """The order of pictures: a pure function of the seed, the index and the group's size.

    The pictures of a bucket come in epochs of their own, each a permutation, and a group of samples takes
    the next ones, across the end of such an epoch. With one bucket that is all: the group's size changes
    nothing. With several, after ``e`` epochs a bucket with ``n`` of the samples of an epoch has had
    ``floor(e n / group)`` groups, so in the long run every picture is seen equally often; within an epoch the
    buckets' groups are shuffled.

    Args:
        members: Positions of the pictures of each bucket, an entry for every repeat.
        group: Samples of one optimizer step: batch size times accumulation.
        generator: Returns a fresh generator for an epoch, the number of a bucket and a purpose.
    """

    def __init__(
        self,
        members: Mapping[Size, Sequence[int]],
        *,
        group: int,
        generator: Callable[[int, int, str], torch.Generator],
    ) -> None:
        self.sizes = list(members)
        self._members = list(members.values())
        self._group = group
        self._generator = generator
        self._permutations: list[dict[int, list[int]]] = [{} for _ in self._members]
        self._plans: dict[int, list[tuple[int, int]]] = {}

    def __getitem__(self, index: int) -> tuple[int, Size]:
        """Return position and size of the picture of a global sample index."""
        group, within = divmod(index, self._group)
        bucket, before = self._bucket(group)
        members = self._members[bucket]
        epoch, place = divmod(before * self._group + within, len(members))
        chosen = self._permutation(epoch, bucket)[place]
        return members[chosen], self.sizes[bucket]

    def _bucket(self, group: int) -> tuple[int, int]:
        """Return the bucket of a group and how many groups that bucket had before."""
        if len(self._members) == 1:
            return 0, group
        epoch = self._epoch(group)
        before = self._groups_before(epoch)
        bucket, within = self._plan(epoch)[group - sum(before)]
        return bucket, before[bucket] + within

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """Return the groups of an epoch: the bucket of each and how many it had before in this epoch."""
        if epoch not in self._plans:
            before, after = self._groups_before(epoch), self._groups_before(epoch + 1)
            labels = [bucket for bucket, first in enumerate(before) for _ in range(first, after[bucket])]
            order = torch.randperm(len(labels), generator=self._generator(epoch, 0, "groups")).tolist()
            seen = [0] * len(before)
            plan = []
            for number in order:
                bucket = labels[number]
                plan.append((bucket, seen[bucket]))
                seen[bucket] += 1
            self._plans = {epoch: plan}
        return self._plans[epoch]

    def _epoch(self, group: int) -> int:
        """Return the last epoch that starts no later than a group."""
        size = sum(map(len, self._members))
        # Rounding down takes less than one group from each bucket.
        latest = (group + len(self._members)) * self._group // size + 1
        return bisect.bisect_right(range(latest + 1), group, key=lambda e: sum(self._groups_before(e))) - 1

    def _groups_before(self, epoch: int) -> list[int]:
        return [epoch * len(members) // self._group for members in self._members]

    def _permutation(self, epoch: int, bucket: int) -> list[int]:
        known = self._permutations[bucket]
        if epoch not in known:
            # A group lies in at most two of its bucket's epochs unless it is larger than they are.
            for old in [key for key in known if key < epoch - 1]:
                del known[old]
            generator = self._generator(epoch, bucket, "order")
            known[epoch] = torch.randperm(len(self._members[bucket]), generator=generator).tolist()
        return known[epoch]
