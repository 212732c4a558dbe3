"""A table's loops, compiled. Each has a slow twin in ``shoal.testing.tables``, and the same bits.

An index is an open-addressing table with linear probing. An id's first place is its hash, scaled to the capacity: so
places are in the order of hashes, and to grow is to copy in order. While an index grows there are two; what is not
found in the new one is looked for in the old one.

``ref`` of a place: 0 for an empty one, r + 1 for row r, -n for an id that was pushed n times and has no row yet, and
``GRAVE`` for one whose id was removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint16 as u16
from numpy import uint32 as u32
from numpy import uint64 as u64

from shoal.compiling import kernel
from shoal.tables.prefetch import prefetch, prefetch_row

Array = Any
Places = Any
"""(ids int64, refs int32, touched uint32, seen_at int64 or of size 0), each (capacity,); the first three side by side
in memory."""

Index = Any
"""(ids, refs) of it."""

Form = Any
"""(rule, words of weights, whether they are bfloat16, the rule's numbers, what its slots begin at, the key that initial
values are drawn by, their scale)"""

GRAVE = i32(-(2**31))
LIVE, NEXT, FREE, WAITING, GRAVES, MOVED, EMPTY, REFUSED, MARK, MARKED = range(10)
"""Of the state (10,) int64: rows in use, the first row never used, 1 + the first free row, ids counted and without a
row, graves in the newest index, places moved from the old index, the last empty one of them, ids refused a row; the
push after which ids that are touched are noted, and how many are (-1: too many)."""

SGD, ADAGRAD, ADAM, FTRL = range(4)

_AHEAD = 12
"""So many ids ahead memory is asked for."""

_GAMMA = u64(0x9E3779B97F4A7C15)
_FIRST = u64(0xBF58476D1CE4E5B9)
_SECOND = u64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32, _S40 = u64(30), u64(27), u64(31), u64(32), u64(40)
_TO_UNIT = f32(2.0**-23)


@kernel
def mix(word: Any) -> Any:
    """SplitMix64's output function, as in ``shoal.lanes.hashing``."""
    word = u64(word + _GAMMA)
    word = u64((word ^ (word >> _S30)) * _FIRST)
    word = u64((word ^ (word >> _S27)) * _SECOND)
    return u64(word ^ (word >> _S31))


@kernel
def _home(key: int, capacity: int) -> Any:
    return i64(((mix(u64(key)) >> _S32) * u64(capacity)) >> _S32)


@kernel
def _find(key: int, ids: Array, refs: Array) -> Any:
    """An id's place, or -1 - the place where it would go."""
    capacity = ids.size
    place = _home(key, capacity)
    while refs[place] != 0:
        if ids[place] == key and refs[place] != GRAVE:
            return place
        place += 1
        if place == capacity:
            place = 0
    return -1 - place


@kernel
def initial(key: Any, row_id: int, scale: Any, out: Array) -> None:
    """A new row's weights: uniform in [-scale, scale), 24 bits each."""
    word = mix(key ^ mix(u64(row_id)))
    for j in range(out.size):
        out[j] = (f32(mix(word + u64(j)) >> _S40) * _TO_UNIT - f32(1.0)) * scale


# Weights at rest


@kernel
def load(row: Array, half: bool, out: Array) -> None:
    """A row's weights as float32."""
    if not half:
        for j in range(out.size):
            out[j] = row[j]
        return
    halves, words = row.view(u16), out.view(u32)
    for j in range(out.size):
        words[j] = u32(halves[j]) << u32(16)


@kernel
def store(weights: Array, half: bool, noise: Any, row: Array) -> None:
    """The other way round. To bfloat16 the 16 bits that go are rounded up with their own probability."""
    if not half:
        for j in range(weights.size):
            row[j] = weights[j]
        return
    halves, words = row.view(u16), weights.view(u32)
    for j in range(weights.size):
        rounded = u64(words[j])
        if rounded & u64(0x7F800000) != u64(0x7F800000):  # infinities and what is no number stay
            rounded += mix(noise + u64(j)) & u64(0xFFFF)
        halves[j] = u16(rounded >> u64(16))


@kernel
def derive(row: Array, numbers: Array, out: Array) -> None:
    """FTRL's weights from z and n."""
    alpha, beta, l1, l2 = numbers[0], numbers[1], numbers[2], numbers[3]
    dim = out.size
    for j in range(dim):
        z, n = row[j], row[dim + j]
        if abs(z) <= l1:
            out[j] = f32(0.0)
        else:
            sign = f32(1.0) if z > f32(0.0) else f32(-1.0)
            out[j] = -(z - sign * l1) / ((beta + np.sqrt(n)) / alpha + l2)


@kernel
def read(row: Array, code: int, half: bool, numbers: Array, out: Array) -> None:
    """A row's weights, whatever the rule."""
    if code == FTRL:
        derive(row, numbers, out)
    else:
        load(row, half, out)


# Updates


@kernel
def update(code: int, numbers: Array, weights: Array, slots: Array, gradient: Array) -> None:
    """A row takes a gradient. FTRL's weights are those before it, and are not changed."""
    dim = gradient.size
    one = f32(1.0)
    if code == SGD:
        for j in range(dim):
            weights[j] -= numbers[0] * gradient[j]
    elif code == ADAGRAD:
        rate, eps = numbers[0], numbers[1]
        for j in range(dim):
            squared = slots[j] + gradient[j] * gradient[j]
            slots[j] = squared
            weights[j] -= rate * gradient[j] / (np.sqrt(squared) + eps)
    elif code == ADAM:
        slots[2 * dim] *= numbers[1]
        slots[2 * dim + 1] *= numbers[2]
        root = np.sqrt(one - slots[2 * dim + 1])
        rate, eps = numbers[0] * root / (one - slots[2 * dim]), numbers[3] * root
        beta1, beta2 = numbers[1], numbers[2]
        for j in range(dim):
            mean = beta1 * slots[j] + (one - beta1) * gradient[j]
            squared = beta2 * slots[dim + j] + (one - beta2) * (gradient[j] * gradient[j])
            slots[j], slots[dim + j] = mean, squared
            weights[j] -= rate * mean / (np.sqrt(squared) + eps)
    else:
        for j in range(dim):
            n = slots[dim + j]
            squared = n + gradient[j] * gradient[j]
            sigma = (np.sqrt(squared) - np.sqrt(n)) / numbers[0]
            slots[j] += gradient[j] - sigma * weights[j]
            slots[dim + j] = squared


# Over many ids


@kernel
def pull(keys: Array, indices: tuple[Index, Index], rows: Array, form: Form, out: Array) -> Any:
    """(n,) ids -> (n, dim) weights; how many of them have a row. The newest index and the one before."""
    code, num_words, half, numbers, _, origin, scale = form
    (ids, own), (old_ids, old_own) = indices
    refs = np.empty(keys.size, i32)
    num_found, dim = 0, out.shape[1]
    for i in range(keys.size):
        if i + _AHEAD < keys.size:
            prefetch(ids, _home(keys[i + _AHEAD], ids.size))
        place = _find(keys[i], ids, own)
        refs[i] = own[place] if place >= 0 else i32(0)
        if place < 0 and old_ids.size:
            place = _find(keys[i], old_ids, old_own)
            refs[i] = old_own[place] if place >= 0 else i32(0)
    for i in range(keys.size):
        if i + _AHEAD < keys.size and refs[i + _AHEAD] > 0:
            prefetch_row(rows, refs[i + _AHEAD] - 1, rows.shape[1] if code == FTRL else num_words)
        ref = refs[i]
        if ref > 0:
            num_found += 1
            if half or code == FTRL:
                read(rows[ref - 1], code, half, numbers, out[i])
            else:
                for j in range(dim):
                    out[i, j] = rows[ref - 1, j]
        elif code == FTRL:
            out[i, :] = f32(0.0)
        else:
            initial(origin, keys[i], scale, out[i])
    return num_found


@kernel
def _take_row(rows: Array, state: Array) -> Any:
    """A row that is free; -1 if there is none."""
    if state[FREE]:
        row = state[FREE] - 1
        state[FREE] = i64(rows[row].view(i32)[0])
        return row
    if state[NEXT] == rows.shape[0]:
        return -1
    state[NEXT] += 1
    return state[NEXT] - 1


@kernel
def _begin_row(key: int, row: Array, form: Form, weights: Array) -> None:
    code, num_words, half, _, start, origin, scale = form
    row[:] = f32(0.0)
    if code != FTRL:
        initial(origin, key, scale, weights)
        store(weights, half, origin ^ mix(u64(key)), row)
    row[num_words:] = start
    if code == ADAM:  # the powers of beta1 and beta2
        row[row.size - 2 :] = f32(1.0)


@kernel
def _admit(key: int, ref: Any, kept: tuple[Array, Array, Array], form: Form, admit_after: int, weights: Array) -> Any:
    """The next ref of an id without a row that is pushed: it may get one. ``weights``: (dim,), to work with."""
    rows, state, _ = kept
    if admit_after - 1 > -i64(ref):
        return i32(ref - 1)
    row = _take_row(rows, state)
    if row < 0:
        state[REFUSED] += 1
        return i32(-admit_after)
    _begin_row(key, rows[row], form, weights)
    state[WAITING] -= 1
    state[LIVE] += 1
    return i32(row + 1)


@kernel
def push(
    keys: Array, gradients: Array, places: tuple[Places, Places], kept: tuple[Array, Array, Array], form: Form,
    moment: tuple[int, int, int],
) -> None:  # fmt: skip
    """(n,) ids take (n, dim) gradients, in order. There must be room for n more places in the newest index. ``kept``:
    rows, state and the ids noted, which are changed. ``moment``: the push's number, its event time, and with which push
    of its own an id gets a row."""
    clock, now_s, admit_after = moment
    (ids, refs, touched, seen_at), (old_ids, old_refs, old_touched, old_seen_at) = places
    rows, state, noted = kept
    found, weights = np.empty(keys.size, i32), np.empty(gradients.shape[1], f32)
    mark, marked = state[MARK], state[MARKED]
    for i in range(keys.size):
        key = keys[i]
        if i + _AHEAD < keys.size:
            prefetch(ids, _home(keys[i + _AHEAD], ids.size))
        place, other = _find(key, ids, refs), -1
        if place < 0 and old_ids.size:
            other = _find(key, old_ids, old_refs)
        if place < 0 and other < 0:
            place = -1 - place
            ids[place], refs[place] = key, 0
            state[WAITING] += 1
        if other >= 0:
            ref, last = old_refs[other], i64(old_touched[other])
        else:
            ref, last = refs[place], i64(touched[place])
        if ref <= 0:
            ref = _admit(key, ref, kept, form, admit_after, weights)
        if last <= mark and marked >= 0:  # not noted yet
            if marked == noted.size:
                marked = -1
            else:
                noted[marked] = key
                marked += 1
        if other >= 0:
            old_refs[other], old_touched[other] = ref, u32(clock)
            if old_seen_at.size:
                old_seen_at[other] = now_s
        else:
            refs[place], touched[place] = ref, u32(clock)
            if seen_at.size:
                seen_at[place] = now_s
        found[i] = ref
    state[MARKED] = marked
    _update_rows(keys, gradients, found, rows, form, clock)


@kernel
def _update_rows(keys: Array, gradients: Array, refs: Array, rows: Array, form: Form, clock: int) -> None:
    code, num_words, half, numbers, _, origin, _ = form
    dim = gradients.shape[1]
    weights = np.empty(dim, f32)
    for i in range(keys.size):
        if i + _AHEAD < keys.size and refs[i + _AHEAD] > 0:
            prefetch_row(rows, refs[i + _AHEAD] - 1, rows.shape[1])
        if refs[i] <= 0:
            continue
        row = rows[refs[i] - 1]
        if half or code == FTRL:
            read(row, code, half, numbers, weights)
            update(code, numbers, weights, row[num_words:], gradients[i])
            if half:
                store(weights, half, mix(origin ^ u64(keys[i])) + (u64(clock) << _S32), row)
        else:
            update(code, numbers, row[:dim], row[dim:], gradients[i])


@kernel
def move(old: Places, new: Places, count: int, state: Array) -> None:
    """Bring so many places more of the old index to the new one; graves stay behind."""
    until = min(state[MOVED] + count, old[0].size)
    for place in range(state[MOVED], until):
        ref = old[1][place]
        if ref == 0:
            state[EMPTY] = place
        if ref == 0 or ref == GRAVE:
            continue
        target = -1 - _find(old[0][place], new[0], new[1])
        new[0][target] = old[0][place]
        new[1][target] = ref
        new[2][target] = old[2][place]
        if new[3].size:
            new[3][target] = old[3][place]
    state[MOVED] = until


@kernel
def sweep(places: Places, rows: Array, before_s: int, removed: Array, state: Array) -> int:
    """Remove what was last pushed before ``before_s``; how many ids, which are put into ``removed``, by place."""
    ids, refs, _, seen_at = places
    count = 0
    for place in range(ids.size):
        ref = refs[place]
        if ref == 0 or ref == GRAVE or seen_at[place] >= before_s:
            continue
        removed[count] = ids[place]
        count += 1
        bury(places, rows, place, state)
    return count


@kernel
def bury(places: Places, rows: Array, place: int, state: Array) -> None:
    """Remove the id of a place."""
    ref = places[1][place]
    if ref > 0:
        rows[ref - 1].view(i32)[0] = i32(state[FREE])
        state[FREE] = i64(ref)
        state[LIVE] -= 1
    else:
        state[WAITING] -= 1
    places[1][place] = GRAVE
    state[GRAVES] += 1


@kernel
def locate(keys: Array, places: Places, out: Array) -> None:
    """(n,) ids -> (n,) their places, or what is below 0."""
    for i in range(keys.size):
        if i + _AHEAD < keys.size:
            prefetch(places[0], _home(keys[i + _AHEAD], places[0].size))
        out[i] = _find(keys[i], places[0], places[1])


@kernel
def noted_places(noted: Array, places: Places, since: int, out: Array) -> int:
    """``chosen`` of some ids alone, of which some may be there twice or be gone."""
    count = 0
    for i in range(noted.size):
        if i + _AHEAD < noted.size:
            prefetch(places[0], _home(noted[i + _AHEAD], places[0].size))
        place = _find(noted[i], places[0], places[1])
        if place >= 0 and i64(places[2][place]) > since:
            out[count] = place
            count += 1
    return count


@kernel
def chosen(places: Places, since: int, out: Array) -> int:
    """The places of ids that were touched after push ``since`` (-1: all that there are); how many."""
    count = 0
    for place in range(places[0].size):
        ref = places[1][place]
        if ref != 0 and ref != GRAVE and i64(places[2][place]) > since:
            out[count] = place
            count += 1
    return count


@kernel
def chosen_in(places: Places, since: int, buckets: Array, out: Array) -> int:
    """``chosen`` of the ids of some ``buckets`` (4096,) alone."""
    count = 0
    for place in range(places[0].size):
        ref = places[1][place]
        is_there = ref != 0 and ref != GRAVE and i64(places[2][place]) > since
        if is_there and buckets[i64(mix(u64(places[0][place])) & u64(buckets.size - 1))]:
            out[count] = place
            count += 1
    return count


@kernel
def bury_all(chosen_places: Array, places: Places, rows: Array, state: Array) -> None:
    """Remove the ids of these places."""
    for i in range(chosen_places.size):
        bury(places, rows, chosen_places[i], state)


@kernel
def put(keys: Array, values: Places, data: Array, places: Places, rows: Array, state: Array) -> int:
    """Set ids to what an image says of them, in a place of their own: refs (n,), of which only the sign and a count
    below 0 matter, touched (n,), seen_at (n,), and a row of ``data`` for each that has one. How many rows were read;
    it stops short where no row is free."""
    count = 0
    for i in range(keys.size):
        place = _find(keys[i], places[0], places[1])
        if place < 0:
            place = -1 - place
            places[0][place] = keys[i]
            places[1][place] = i32(-1)
            state[WAITING] += 1
        has_row = values[0][i] > 0
        if has_row and places[1][place] < 0:
            row = _take_row(rows, state)
            if row < 0:
                return count
            places[1][place] = i32(row + 1)
            state[WAITING] -= 1
            state[LIVE] += 1
        if has_row:
            rows[places[1][place] - 1, :] = data[count]
            count += 1
        else:
            places[1][place] = values[0][i]
        places[2][place] = values[1][i]
        if places[3].size:
            places[3][place] = values[2][i]
    return count


@kernel
def take_away(keys: Array, places: Places, rows: Array, state: Array) -> None:
    """Remove ids; who is not there is passed over."""
    for i in range(keys.size):
        place = _find(keys[i], places[0], places[1])
        if place >= 0:
            bury(places, rows, place, state)


@kernel
def all_finite(gradients: Array) -> int:
    """The first row that holds what is no finite number, or -1."""
    words = gradients.view(u32)
    for i in range(gradients.shape[0]):
        num_bad = u32(0)
        for j in range(gradients.shape[1]):
            num_bad += u32((words[i, j] & u32(0x7F800000)) == u32(0x7F800000))
        if num_bad:
            return i
    return -1
