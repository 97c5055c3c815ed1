"""Compiled event loops. They share one file, as numba's cache only notices changes of a kernel's own file.

Both loops advance from instant to instant. At an instant, first every task that ends there is completed; a server
that becomes free takes the task that has waited longest. Then the tasks made ready by these completions start or
queue, in task-id order. Tasks of zero length that start end at the same instant and are completed in its next round.

Arguments shared by the loops: duration f8[n], resource i4[n] (-1: the last capacity, which is without bound),
succ_ptr i4[n + 1], succ i4[edges], indegree i4[n], capacity i4[resources + 1].
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit

# Columns of a pool's state: summed demand, progress rate, and an instant with the virtual time then. The virtual
# time of a pool is the work that a task which always ran would have done; it advances at the pool's rate.
LOAD, RATE, TIME, WORK = range(4)
# Columns of `pack`: dependencies left, resource, first successor edge, next task in the resource's queue.
WAITING, RESOURCE, FIRST, BEHIND = range(4)
NONE = np.uint32(0xFFFFFFFF)


@njit(cache=True)
def push(key, item, size, k, i):
    """Adds (k, i) to a binary heap of `size` entries, ordered by key, then item."""
    while size > 0:
        parent = (size - 1) >> 1
        if key[parent] < k or (key[parent] == k and item[parent] < i):
            break
        key[size] = key[parent]
        item[size] = item[parent]
        size = parent
    key[size] = k
    item[size] = i


@njit(cache=True)
def replace(key, item, size, k, i):
    """Puts (k, i) in the place of the smallest entry of a heap that has `size` entries afterwards."""
    hole = 0
    child = 1
    while child < size:
        right = child + 1
        if right < size and (key[right] < key[child] or (key[right] == key[child] and item[right] < item[child])):
            child = right
        if k < key[child] or (k == key[child] and i < item[child]):
            break
        key[hole] = key[child]
        item[hole] = item[child]
        hole = child
        child = 2 * hole + 1
    key[hole] = k
    item[hole] = i


@njit(cache=True)
def enqueue(head, tail, behind, r, i):
    """Appends task i to the linked queue of resource r."""
    behind[i] = -1
    if head[r] < 0:
        head[r] = i
    else:
        behind[tail[r]] = i
    tail[r] = i


@njit(cache=True)
def pack(resource, succ_ptr, indegree, unbound):
    """What `run_fifo` needs of a task, u4[n + 1, 4] in one cache line: one miss per task rather than four."""
    n = resource.size
    node = np.empty((n + 1, 4), np.uint32)
    for i in range(n):
        node[i, WAITING] = indegree[i]
        node[i, RESOURCE] = resource[i] if resource[i] >= 0 else unbound
        node[i, FIRST] = succ_ptr[i]
        node[i, BEHIND] = NONE
    node[n, FIRST] = succ_ptr[n]
    return node


@njit(cache=True)
def sources(indegree, ready):
    """Puts the tasks that wait for none at the front of `ready`, in order; returns how many."""
    count = 0
    for i in range(indegree.size):
        if indegree[i] == 0:
            ready[count] = i
            count += 1
    return count


@njit(cache=True)
def empty_tree(leaves):
    """A tournament tree over at least so many leaves, none of which has anything to come."""
    size = 1
    while size < leaves:
        size *= 2
    return np.full(2 * size, np.inf)


@njit(cache=True)
def run_fifo(duration, resource, succ_ptr, succ, indegree, capacity, slots):
    """(start f8[n], completed tasks) without pools. `slots` bounds the number of tasks that run at once."""
    n = duration.size
    start = np.empty(n)
    node = pack(resource, succ_ptr, indegree, capacity.size - 1)
    free = capacity.copy()
    head = np.full(capacity.size, NONE, np.uint32)
    tail = np.full(capacity.size, NONE, np.uint32)
    key = np.empty(slots)
    item = np.empty(slots, np.uint32)
    size = 0
    ready = np.empty(n, np.uint32)
    count = sources(indegree, ready)
    now = 0.0
    done = 0
    while True:
        for j in range(count):
            i = ready[j]
            r = node[i, RESOURCE]
            if free[r] > 0:
                free[r] -= 1
                start[i] = now
                push(key, item, size, now + duration[i], i)
                size += 1
            else:
                if head[r] == NONE:
                    head[r] = i
                else:
                    node[tail[r], BEHIND] = i
                tail[r] = i
        if size == 0:
            return start, done
        now = key[0]
        count = 0
        ordered = True
        while size > 0 and key[0] == now:
            i = item[0]
            r = node[i, RESOURCE]
            done += 1
            first = head[r]
            if first != NONE:  # the server goes on with the next task: one pass through the heap, not two
                head[r] = node[first, BEHIND]
                start[first] = now
                replace(key, item, size, now + duration[first], first)
            else:
                free[r] += 1
                size -= 1
                replace(key, item, size, key[size], item[size])
            for e in range(node[i, FIRST], node[np.int64(i) + 1, FIRST]):
                s = succ[e]
                left = node[s, WAITING] - np.uint32(1)
                node[s, WAITING] = left
                if left == 0:
                    if count > 0 and s < ready[count - 1]:
                        ordered = False
                    ready[count] = s
                    count += 1
        if not ordered:
            ready[:count].sort()


@njit(cache=True)
def virtual_time(state, p, now):
    return state[p, WORK] + state[p, RATE] * (now - state[p, TIME])


@njit(cache=True)
def set_next(tree, p, time):
    """Leaf p of a tree of minima becomes `time`."""
    node = tree.size // 2 + p
    tree[node] = time
    while node > 1:
        node >>= 1
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@njit(cache=True)
def first_leaf(tree):
    """The first leaf that holds the tree's minimum."""
    node = 1
    while node < tree.size // 2:
        node = 2 * node if tree[2 * node] <= tree[2 * node + 1] else 2 * node + 1
    return node - tree.size // 2


@njit(cache=True)
def schedule_next(tree, state, key, slots, size, p, now):
    """Notes when pool p completes its next task, if its rate stays."""
    time = np.inf
    if size[p] > 0:
        time = max(now, state[p, TIME] + (key[slots[p]] - state[p, WORK]) / state[p, RATE])
    set_next(tree, p, time)


@njit(cache=True)
def settle(tree, state, cores, key, slots, size, p, now):
    """Gives pool p the rate of its present load."""
    if size[p] == 0:  # an empty pool starts afresh at virtual time = time, so that rounding never piles up
        state[p] = (0.0, 1.0, 0.0, 0.0)
    else:
        rate = 1.0 if state[p, LOAD] <= cores[p] else cores[p] / state[p, LOAD]
        if rate != state[p, RATE]:
            state[p, WORK] = virtual_time(state, p, now)
            state[p, TIME] = now
            state[p, RATE] = rate
    schedule_next(tree, state, key, slots, size, p, now)


@njit(cache=True)
def touch(p, touched, changed):
    """Adds pool p to the list of pools whose load changed; the list's length stands at its end."""
    if not touched[p]:
        touched[p] = True
        changed[changed[-1]] = p
        changed[-1] += 1


@njit(cache=True)
def begin(i, now, duration, demand, pool, state, key, item, slots, size, start):
    """Starts task i in its pool."""
    p = pool[i]
    low, high = slots[p], slots[p + 1]
    start[i] = now
    push(key[low:high], item[low:high], size[p], virtual_time(state, p, now) + duration[i], i)
    size[p] += 1
    state[p, LOAD] += demand[i]


@njit(cache=True)
def end_first(p, demand, state, key, item, slots, size):
    """Takes the first task to complete out of pool p."""
    low, high = slots[p], slots[p + 1]
    i = item[low]
    size[p] -= 1
    last = low + size[p]
    replace(key[low:high], item[low:high], size[p], key[last], item[last])
    state[p, LOAD] -= demand[i]
    return i


@njit(cache=True)
def run_shared(duration, resource, succ_ptr, succ, indegree, capacity, demand, pool, cores, slots):
    """(start f8[n], finish f8[n], completed tasks) with pools.

    pool i4[n]: pool of each task; the last pool has infinitely many cores and holds the tasks that share nothing.
    cores f8[pools]; slots i8[pools + 1]: pool p keeps its heap of virtual finish times in slots[p]:slots[p + 1].
    """
    n, pools = duration.size, cores.size
    start, finish = np.empty(n), np.empty(n)
    waiting, free = indegree.copy(), capacity.copy()
    head, tail = np.full(capacity.size, -1, np.int32), np.full(capacity.size, -1, np.int32)
    behind = np.empty(n, np.int32)
    key, item, size = np.empty(slots[-1]), np.empty(slots[-1], np.int32), np.zeros(pools, np.int32)
    state = np.zeros((pools, 4))
    state[:, RATE] = 1.0
    tree = empty_tree(pools)  # of the pools' next completions
    touched, changed = np.zeros(pools, np.bool_), np.zeros(pools + 1, np.int32)
    ready = np.empty(n, np.int32)
    count = sources(indegree, ready)
    now, done = 0.0, 0
    while True:
        if count > 1:
            ready[:count].sort()
        for j in range(count):
            i = ready[j]
            r = resource[i]
            if free[r] > 0:
                free[r] -= 1
                begin(i, now, duration, demand, pool, state, key, item, slots, size, start)
                touch(pool[i], touched, changed)
            else:
                enqueue(head, tail, behind, r, i)
        for j in range(changed[-1]):
            settle(tree, state, cores, key, slots, size, changed[j], now)
            touched[changed[j]] = False
        changed[-1] = 0
        if tree[1] == np.inf:
            return start, finish, done
        now, count = tree[1], 0
        while tree[1] == now:
            p = first_leaf(tree)
            i = end_first(p, demand, state, key, item, slots, size)
            touch(p, touched, changed)
            finish[i] = now
            done += 1
            r = resource[i]
            first = head[r]
            if first >= 0:
                head[r] = behind[first]
                begin(first, now, duration, demand, pool, state, key, item, slots, size, start)
                touch(pool[first], touched, changed)
                schedule_next(tree, state, key, slots, size, pool[first], now)
            else:
                free[r] += 1
            schedule_next(tree, state, key, slots, size, p, now)
            for e in range(succ_ptr[i], succ_ptr[i + 1]):
                s = succ[e]
                waiting[s] -= 1
                if waiting[s] == 0:
                    ready[count] = s
                    count += 1


@njit(cache=True)
def run_in_order(duration, resource, succ_ptr, succ, resources):
    """(start f8[n], whether every edge ascends): tasks in id order, each resource (-1: none) one at a time."""
    n = duration.size
    start = np.zeros(n)
    free_at = np.zeros(resources)
    ascending = True
    for i in range(n):
        r = resource[i]
        begins = start[i]
        if r >= 0:
            begins = max(begins, free_at[r])
            start[i] = begins
        ends = begins + duration[i]
        if r >= 0:
            free_at[r] = ends
        for e in range(succ_ptr[i], succ_ptr[i + 1]):
            s = succ[e]
            ascending &= s > i
            start[s] = max(start[s], ends)
    return start, ascending
