#pragma once
// A panel as the plan stores it (plans/cuda_panel.py): a dense rectangle of gathered rows and columns.
#include "types.cuh"

struct Panel {
    i64 entry;
    i64 row_start, rows, row_at;           // start >= 0: a range; else a list from row_at on
    i64 column_start, columns, column_at;  // the same
    i64 mask;                              // byte of mask_bits, or -1: every element is kept
    i64 slot;                              // first slot in the last axis of the values
    i64 row_used, column_used;             // places in the lists of rows, columns with a live element

    // Slots from one row to the next.
    __device__ __forceinline__ i64 pitch() const { return (columns + 7) / 8 * 8; }
    // Matrix row of the panel's i-th row, i < rows; likewise columns.
    __device__ __forceinline__ int row(const int *list, i64 i) const {
        return row_start >= 0 ? int(row_start + i) : __ldg(list + row_at + i);
    }
    __device__ __forceinline__ int column(const int *list, i64 i) const {
        return column_start >= 0 ? int(column_start + i) : __ldg(list + column_at + i);
    }
};
