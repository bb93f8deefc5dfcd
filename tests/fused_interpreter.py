"""What a fused plan means, read literally: no code of the planner or the kernels is used here.

``expand`` writes the mask that a plan computes on and counts how often each position is computed;
``attention`` runs a plan: packing, items with their partial results, single entries, the merge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.attention.cuda.tables import Tables

PACKED = 1 << 24


def literal_places() -> Tensor:
    """(128, 32) where in a unit of 64 × 64 every bit of every thread's register stands."""
    places = torch.full((128, 32), -1)
    for t in range(128):
        w, g, p = t // 32, t % 32 // 4, t % 4
        for j in range(8):
            for e in range(2):
                for h in range(2):
                    row, column = 16 * w + g + 8 * h, 8 * j + 2 * p + e
                    places[t, 2 * j + e + 16 * h] = 64 * row + column
    return places


PLACES = literal_places()


def literal_masks(words: Tensor) -> Tensor:
    """bool (n, 64, 64) of masks in register order, int32 (n, 128)."""
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1).bool()
    out = torch.zeros(len(words), 64 * 64, dtype=torch.bool)
    out[:, PLACES.flatten()] = bits.flatten(1)
    return out.view(-1, 64, 64)


def members(unit: int, packed: Tensor, extent: int) -> Tensor:
    """The rows of a unit, −1 where there is none."""
    if unit >= PACKED:
        return packed[(unit - PACKED) * 64 :][:64].long()
    rows = torch.arange(unit * 64, unit * 64 + 64)
    return torch.where(rows < extent, rows, -1)


class Literal:
    """A plan whose masks have been read."""

    def __init__(self, work) -> None:
        self.work = work
        self.masks = literal_masks(work.masks)

    def tile(self, mask: int) -> Tensor:
        """bool (64, 64)."""
        return torch.ones(64, 64, dtype=torch.bool) if mask < 0 else self.masks[mask]

    def items(self, u: int):
        """(unit, slot, [(key unit, mask) …]) of all warpgroups of every item of a pattern."""
        work = self.work
        steps = work.steps.tolist()
        for item in work.items[work.item_starts[u] : work.item_starts[u + 1]].tolist():
            mine = steps[item[3] : item[3] + item[4]]
            groups = work.groups
            assert item[groups:3] + item[5 + groups :] == [-1] * 2 * (3 - groups)
            for step in mine:
                assert step[1 + groups :] == [-2] * (3 - groups) and step[1:] != [-2] * 3
            for group in range(groups):
                unit, slot = item[group], item[5 + group]
                own = [(s[0], s[1 + group]) for s in mine if s[1 + group] != -2]
                assert unit >= 0 or (slot < 0 and not own)
                if unit >= 0:
                    yield unit, slot, own
                if unit >= PACKED:
                    assert slot >= 0

    def sources(self, u: int):
        """row -> the partial rows that make it up, of a pattern."""
        work = self.work
        first, last = work.merge_starts[u : u + 2]
        ptr = work.merge_ptr.tolist()
        rows = work.merge_rows[first:last].tolist()
        assert rows == sorted(set(rows))
        found = work.merge_from.tolist()
        return {row: found[ptr[n] : ptr[n + 1]] for n, row in enumerate(rows, first)}

    def rows(self, u: int):
        """(row, columns, partial row) of every item of single entries of a pattern."""
        work, nq = self.work, self.work.shape[0]
        for row, count, partial, begin in work.row_items[
            work.row_starts[u] : work.row_starts[u + 1]
        ].tolist():
            at = int(work.row_offsets[u * nq + row]) + begin
            assert at + count <= int(work.row_offsets[u * nq + row + 1])
            yield row, work.columns[at : at + count].long(), partial


def tables(work, shape: tuple[int, int, int], *_) -> Tables:
    """What ``tables.tables`` finds for every matrix, and one CTA for all tiles."""
    batch, heads, kv = shape
    entry = torch.tensor(work.entry).view(work.lead).expand(batch, heads)
    by_head = work.lead[1] > 1
    dead = None
    if work.dead.numel():
        each = work.dead[entry].view(batch, kv, heads // kv, -1)
        dead = each.all(2)  # a head's value is left alone if a query's head needs it
    queries = entry.int()
    keys = queries if by_head else queries[:, :1].expand(batch, kv)
    tiles = [
        (item, matrix)
        for matrix, u in enumerate(entry.flatten().tolist())
        for item in range(work.item_starts[u], work.item_starts[u + 1])
    ]
    walk = torch.tensor([0, len(tiles)], dtype=torch.int32)
    ranges = torch.zeros(batch * heads, 2, dtype=torch.int32)
    return Tables(
        walk, torch.tensor(tiles, dtype=torch.int32).view(-1, 2), queries, keys, ranges,
        ranges.new_zeros(2, batch * heads, 4), dead,
    )  # fmt: skip


def expand(work) -> tuple[Tensor, Tensor]:
    """int (U, nq, nk), how often each position is computed and reaches the output; and int (U, nq),
    how often each row of the output is written last."""
    literal = Literal(work)
    nq, nk = work.shape
    times = torch.zeros(work.patterns, nq, nk, dtype=torch.int64)
    written = torch.zeros(work.patterns, nq, dtype=torch.int64)
    for u in range(work.patterns):
        partial = {}
        straight = torch.zeros(nq, nk, dtype=torch.int64)
        final = torch.zeros(nq, dtype=torch.int64)
        for unit, slot, own in literal.items(u):
            rows = members(unit, work.query_rows[u], nq)
            kept = torch.zeros(64, nk, dtype=torch.int64)
            for key, mask in own:
                tile, columns = literal.tile(mask), members(key, work.key_rows[u], nk)
                absent = columns < 0
                # A position behind the last key must be masked out: a zero key would count.
                assert not (tile & absent)[rows >= 0].any()
                kept.index_add_(1, columns.clamp(min=0), (tile & ~absent).long())
            for r, row in enumerate(rows.tolist()):
                if slot >= 0:
                    assert slot * 64 + r not in partial
                    partial[slot * 64 + r] = (row, kept[r])
                elif row >= 0:
                    straight[row] += kept[r]
                    final[row] += 1
        for row, columns, to in literal.rows(u):
            mine = torch.zeros(nk, dtype=torch.int64).index_add_(
                0, columns, torch.ones_like(columns)
            )
            if to >= 0:
                assert to not in partial
                partial[to] = (row, mine)
            else:
                straight[row] += mine
                final[row] += 1
        used = set()
        for row, from_ in literal.sources(u).items():
            assert from_ == sorted(from_)
            # The merge writes last: whatever was written straight is lost.
            straight[row] = 0
            final[row] = 1
            for source in from_:
                assert partial[source][0] == row and source not in used
                used.add(source)
                assert source < work.slots * 64
                straight[row] += partial[source][1]
        merged = set(literal.sources(u))
        for source, (row, _) in partial.items():
            # Of rows that others make up, one may hold anything.
            assert source in used or row < 0 or row in merged, "a partial result nobody reads"
        times[u], written[u] = straight, final
    return times, written


def _softmax(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return p @ v, lse


def pack(x: Tensor, rows: Tensor, pattern: Tensor) -> Tensor:
    """(B, Hp, n, D): the listed rows of every matrix, zeros where there is none."""
    b, h = pattern.shape
    ratio = h // x.shape[1]
    out = x.new_zeros(b, h, rows.shape[1], x.shape[3])
    for i in range(b):
        for j in range(h):
            mine = rows[pattern[i, j]]
            out[i, j, mine >= 0] = x[i, j // ratio, mine[mine >= 0].long()]
    return out


def run_items(work, q, k, v, packed, scale, out, lse, part, part_lse, sink, entry) -> None:
    """Every item of every matrix; straight results to out and lse, others to their slots."""
    literal = Literal(work)
    pq, pk, pv = packed
    nq = work.shape[0]

    def bring(x: Tensor, gathered: Tensor | None, unit: int, b: int, h: int, heads: int) -> Tensor:
        if unit >= PACKED:
            return gathered[b, h * gathered.shape[1] // heads, (unit - PACKED) * 64 :][:64]
        mine = x[b, h * x.shape[1] // heads, unit * 64 : unit * 64 + 64]
        return torch.cat([mine, mine.new_zeros(64 - len(mine), mine.shape[1])])

    heads = q.shape[1]
    for b in range(q.shape[0]):
        for h in range(heads):
            for unit, slot, own in literal.items(int(entry[b, h])):
                qs = bring(q, pq, unit, b, h, heads).float() * scale
                ks = [bring(k, pk, key, b, h, heads) for key, _ in own]
                vs = [bring(v, pv, key, b, h, heads) for key, _ in own]
                if own:
                    kept = torch.cat([literal.tile(mask) for _, mask in own], 1)
                    s = (qs @ torch.cat(ks).float().T).masked_fill(~kept, -torch.inf)
                    o, logs = _softmax(s, torch.cat(vs).float())
                else:
                    o, logs = qs.new_zeros(64, v.shape[3]), qs.new_full((64,), -torch.inf)
                if slot >= 0:
                    part[b, h, slot], part_lse[b, h, slot] = o, logs
                    continue
                n = min(64, nq - unit * 64)
                o, logs = with_sink(o[:n], logs[:n], None if sink is None else sink[h])
                out[b, h, unit * 64 : unit * 64 + n] = o.to(out.dtype)
                lse[b, h, unit * 64 : unit * 64 + n] = logs


def with_sink(o: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """One more term of the denominator."""
    if sink is None:
        return o, lse
    total = torch.logaddexp(lse, sink.float())
    return o * torch.exp(lse - total.clamp(min=-3e38))[..., None], total


def run_rows(work, q, k, v, scale, out, lse, part, part_lse, sink, entry, keep) -> None:
    """The single entries."""
    ratio = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for row, columns, to in Literal(work).rows(int(entry[b, h])):
                if keep is not None:
                    columns = columns[keep[b, columns]]
                s = q[b, h, row].float() * scale @ k[b, h // ratio, columns].float().T
                o, logs = _softmax(s[None], v[b, h // ratio, columns].float())
                if to >= 0:
                    part.flatten(2, 3)[b, h, to], part_lse.flatten(2)[b, h, to] = o[0], logs[0]
                    continue
                o, logs = with_sink(o, logs, None if sink is None else sink[h])
                out[b, h, row], lse[b, h, row] = o[0].to(out.dtype), logs[0]


def run_merge(work, out, lse, part, part_lse, sink, entry) -> None:
    """Rows of several partial results."""
    part, part_lse = part.flatten(2, 3), part_lse.flatten(2)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for row, sources in Literal(work).sources(int(entry[b, h])).items():
                logs = part_lse[b, h, sources]
                total = torch.logsumexp(logs, 0)
                share = torch.exp(logs - torch.where(total == -torch.inf, 0.0, total))
                parts = torch.where(share[:, None] == 0, 0.0, part[b, h, sources])
                o = (share[:, None] * parts).sum(0)
                o, total = with_sink(o[None], total[None], None if sink is None else sink[h])
                out[b, h, row], lse[b, h, row] = o[0].to(out.dtype), total[0]
