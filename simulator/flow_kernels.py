"""Compiled max-min sharing. An event shares anew only the links that its flows reach through flows in common, as the
rates of all others stay what they are.

State of the loop by flow: WAITING for others or its start, MOVING bytes, ARRIVING (all bytes left, latency runs).
Flows that move on a link form a doubly linked list of path entries, so that starts and ends cost one step a link.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit

WAITING, MOVING, ARRIVING = range(3)


@njit(cache=True)
def settle(key, heap, place, size, i):
    """Moves flow i, whose key changed or which was put at the end, to its place in the heap ordered by (key, flow)."""
    at = place[i]
    k = key[i]
    while at > 0:
        parent = (at - 1) >> 1
        other = heap[parent]
        if key[other] < k or (key[other] == k and other < i):
            break
        heap[at] = other
        place[other] = at
        at = parent
    child = 2 * at + 1
    while child < size:
        right = child + 1
        if right < size:
            a, b = heap[child], heap[right]
            if key[b] < key[a] or (key[b] == key[a] and b < a):
                child = right
        other = heap[child]
        if k < key[other] or (k == key[other] and i < other):
            break
        heap[at] = other
        place[other] = at
        at = child
        child = 2 * at + 1
    heap[at] = i
    place[i] = at


@njit(cache=True)
def insert(key, heap, place, size, i, k):
    """Adds flow i with key k; returns the new size."""
    key[i] = k
    heap[size] = i
    place[i] = size
    settle(key, heap, place, size + 1, i)
    return size + 1


@njit(cache=True)
def pop(key, heap, place, size):
    """(new size, the flow with the smallest key)."""
    i = heap[0]
    size -= 1
    if size > 0:
        last = heap[size]
        heap[0] = last
        place[last] = 0
        settle(key, heap, place, size, last)
    return size, i


@njit(cache=True)
def fill(members, links, cap, roads, lists, level, rate, work):
    """Progressive filling of the member flows over `links`, which no other moving flow uses.

    The level at which a link is full only rises while flows stop below it, so a heap of stale levels is enough: an
    entry that comes out is put back with its present level until it is current. Entries: links, then capped flows.
    """
    key, heap, place, fixed = work
    path_ptr, _, owner = roads
    head, behind, _ = lists
    left, on = level
    size = 0
    base = left.size
    for link in links:
        if on[link] > 0:
            size = insert(key, heap, place, size, link, left[link] / on[link])
    for i in members:
        fixed[i] = False
        if cap[i] < np.inf or path_ptr[i] == path_ptr[i + 1]:
            size = insert(key, heap, place, size, base + i, cap[i])
    while size > 0:
        item = heap[0]
        now = key[item]
        if item < base and on[item] > 0 and left[item] / on[item] > now:
            key[item] = left[item] / on[item]
            settle(key, heap, place, size, item)
            continue
        size, _ = pop(key, heap, place, size)
        if item >= base:
            stop(item - base, now, roads, level, rate, fixed)
        elif on[item] > 0:
            full = left[item] / on[item]
            entry = head[item]
            while entry >= 0:
                stop(owner[entry], full, roads, level, rate, fixed)
                entry = behind[entry]


@njit(cache=True)
def stop(i, now, roads, level, rate, fixed):
    """Fixes the rate of flow i at the level `now` and takes it from its links."""
    if fixed[i]:
        return
    fixed[i] = True
    rate[i] = now
    path_ptr, path, _ = roads
    left, on = level
    for e in range(path_ptr[i], path_ptr[i + 1]):
        link = path[e]
        on[link] -= 1
        left[link] = max(left[link] - now, 0.0)


@njit(cache=True)
def join(i, roads, lists):
    """Puts flow i into the lists of its links."""
    path_ptr, path, _ = roads
    head, behind, before = lists
    for e in range(path_ptr[i], path_ptr[i + 1]):
        first = head[path[e]]
        behind[e] = first
        before[e] = -1
        if first >= 0:
            before[first] = e
        head[path[e]] = e


@njit(cache=True)
def leave(i, roads, lists):
    """Takes flow i out of the lists of its links."""
    path_ptr, path, _ = roads
    head, behind, before = lists
    for e in range(path_ptr[i], path_ptr[i + 1]):
        if before[e] >= 0:
            behind[before[e]] = behind[e]
        else:
            head[path[e]] = behind[e]
        if behind[e] >= 0:
            before[behind[e]] = before[e]


@njit(cache=True)
def touch(i, roads, links, linked, seen_link, stamp):
    """Adds the links of flow i to the first `linked` of `links`; returns how many there are then."""
    path_ptr, path, _ = roads
    for e in range(path_ptr[i], path_ptr[i + 1]):
        link = path[e]
        if seen_link[link] != stamp:
            seen_link[link] = stamp
            links[linked] = link
            linked += 1
    return linked


@njit(cache=True)
def reach(links, linked, members, count, roads, lists, seen_link, seen_flow, stamp, level, capacity):
    """Extends `links` and `members` to all that hang together with them; sets what the links have to give."""
    head, behind, _ = lists
    left, on = level
    owner = roads[2]
    at = 0
    while at < linked:
        link = links[at]
        at += 1
        left[link] = capacity[link]
        on[link] = 0
        entry = head[link]
        while entry >= 0:
            on[link] += 1
            i = owner[entry]
            if seen_flow[i] != stamp:
                seen_flow[i] = stamp
                members[count] = i
                count += 1
                linked = touch(i, roads, links, linked, seen_link, stamp)
            entry = behind[entry]
    return linked, count


@njit(cache=True)
def prepare(path_ptr, path, n, m):
    """Empty state for n flows on m links: roads (paths and the flow of every path entry), lists, level, work."""
    owner = np.empty(path.size, np.int32)
    for i in range(n):
        owner[path_ptr[i] : path_ptr[i + 1]] = i
    entries = path.size
    lists = (np.full(m, -1, np.int32), np.empty(entries, np.int32), np.empty(entries, np.int32))
    work = (np.empty(m + n), np.empty(m + n, np.int32), np.empty(m + n, np.int32), np.zeros(n, np.bool_))
    return (path_ptr, path, owner), lists, (np.empty(m), np.zeros(m, np.int32)), work


@njit(cache=True)
def share_all(cap, path_ptr, path, capacity):
    """Rates of all flows at once."""
    n, m = cap.size, capacity.size
    roads, lists, level, work = prepare(path_ptr, path, n, m)
    links, linked = np.empty(m, np.int32), 0
    seen = np.zeros(m, np.int64)
    level[0][:] = capacity
    for i in range(n):
        join(i, roads, lists)
        linked = touch(i, roads, links, linked, seen, 1)
        for e in range(path_ptr[i], path_ptr[i + 1]):
            level[1][path[e]] += 1
    rate = np.zeros(n)
    fill(np.arange(n).astype(np.int32), links[:linked], cap, roads, lists, level, rate, work)
    return rate


@njit(cache=True)
def first_events(indegree, begin, key, heap, place):
    """Puts the begin of all flows that wait for none into an empty heap; returns its size."""
    events = 0
    for i in range(indegree.size):
        if indegree[i] == 0:
            events = insert(key, heap, place, events, i, begin[i])
    return events


@njit(cache=True)
def run_flows(size, begin, latency, cap, path_ptr, path, succ_ptr, succ, indegree, capacity):
    """(start f8[n], finish f8[n], flows that finished). An instant: all its events, then one sharing."""
    n, m = size.size, capacity.size
    roads, lists, level, work = prepare(path_ptr, path, n, m)
    start, finish, state, waiting = np.zeros(n), np.zeros(n), np.zeros(n, np.int8), indegree.copy()
    rest, rate, since, was = size.copy(), np.zeros(n), np.zeros(n), np.zeros(n)
    seen_link, seen_flow = np.full(m, -1, np.int64), np.full(n, -1, np.int64)
    links, members = np.empty(m, np.int32), np.empty(n, np.int32)
    key, heap, place = np.empty(n), np.empty(n, np.int32), np.empty(n, np.int32)
    events = first_events(indegree, begin, key, heap, place)
    done = 0
    stamp = 0
    while events > 0:
        now = key[heap[0]]
        stamp += 1
        linked = 0
        count = 0
        while events > 0 and key[heap[0]] == now:
            events, i = pop(key, heap, place, events)
            if state[i] == ARRIVING:
                finish[i] = now
                done += 1
                for j in succ[succ_ptr[i] : succ_ptr[i + 1]]:
                    waiting[j] -= 1
                    if waiting[j] == 0:
                        events = insert(key, heap, place, events, j, max(now, begin[j]))
                continue
            if state[i] == WAITING:
                start[i] = now
            if state[i] == WAITING and rest[i] > 0.0:
                state[i] = MOVING
                rate[i] = -1.0
                join(i, roads, lists)
                members[count] = i
                count += 1
                seen_flow[i] = stamp
            else:
                if state[i] == MOVING:
                    leave(i, roads, lists)
                state[i] = ARRIVING
                events = insert(key, heap, place, events, i, now + latency[i])
            linked = touch(i, roads, links, linked, seen_link, stamp)
        linked, count = reach(links, linked, members, count, roads, lists, seen_link, seen_flow, stamp, level, capacity)
        for i in members[:count]:
            was[i] = rate[i]
        fill(members[:count], links[:linked], cap, roads, lists, level, rate, work)
        for i in members[:count]:
            if rate[i] == was[i]:
                continue
            if was[i] > 0.0:
                rest[i] = max(rest[i] - was[i] * (now - since[i]), 0.0)
            since[i] = now
            end = now + rest[i] / rate[i]
            if was[i] < 0.0:
                events = insert(key, heap, place, events, i, end)
            else:
                key[i] = end
                settle(key, heap, place, events, i)
    return start, finish, done
