// Who has which of the entries that attention reads in a step of decoding: those of all computed rows and of
// all heads of keys and values are dealt to the launch's blocks of threads, in steps of 16 entries.
//
// A piece is what one block of threads has of one head of one row. Where there are few steps for each block,
// every head is cut into the same number of pieces: a block with parts of two heads would be waited for as
// long as the first part takes. Where there are many, nobody shall have more than another: all blocks get the
// same number of steps, perhaps the end of one head and the beginning of the next.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_step.h"

namespace fathom::cuda {

/// Steps of 16 entries.
struct StepRange {
  int first, end;
};

/// Whose entries, how many there are, for which head, and which of them. `first`: with the row's new entry.
struct AttentionPiece {
  int row, entries, head;
  int piece;  // its number among those of this head
  StepRange range;
  bool first;
};

/// The deal: steps stand in one line, row after row, and in a row head after head. A row without entries has
/// a step too, for the new one. The same in all blocks of threads, each of which works it out for itself.
struct AttentionDeal {
  int rows;                  // that are computed; of each, in their order:
  int row[kDecodeRows];      // its number
  int entries[kDecodeRows];  // before the new one
  int steps[kDecodeRows];    // of each head
  int start[kDecodeRows];    // its first step in the line
  int total;                 // steps in the line
  int blocks;                // even: blocks of threads that have any. Else: pieces of all rows and heads
  bool even;                 // there are many steps
  int pieces;                // of a head; even: at the most

  /// With `rows` and `row` there, all the rest: by one thread. `routed`: the layer's number, or -1 in dense
  /// ones; `kept`: DecodeFixed::kept_before.
  __device__ __forceinline__ void deal(const DecodeStep& s, const unsigned long long* kept, int routed) {
    constexpr int kMany = 4 * kDecodeWarps;  // steps of a block of threads
    const int all = static_cast<int>(gridDim.x);
    int sum = 0, longest = 1;
#pragma unroll 1
    for (int i = 0; i < rows; ++i) {
      entries[i] = routed < 0 ? s.row[row[i]].held
                              : s.entries[row[i]][routed] + static_cast<int>(kept[row[i]] >> routed & 1);
      steps[i] = max(1, (entries[i] + 15) / 16);
      start[i] = sum;
      sum += steps[i] * s.kv_heads;
      longest = max(longest, steps[i]);
    }
    const int heads = rows * s.kv_heads;
    total = sum;
    even = sum >= kMany * all;
    if (even) {
      // A head may begin and end within a block's steps: up to two pieces more than whole blocks. The longest
      // one must not have more than there is room for, however short the others are.
      const long long most = static_cast<long long>(kDecodeSplits - 2) * sum / longest;
      blocks = static_cast<int>(min(static_cast<long long>(all), most));
      pieces = static_cast<int>(static_cast<long long>(longest) * blocks / sum) + 2;
    } else {
      pieces = max(1, min(min(all / heads, kDecodeSplits), (longest + kDecodeWarps - 1) / kDecodeWarps));
      blocks = heads * pieces;
    }
  }
  /// Even: what the block of threads has that is at step `at` of the line and has those before `end`. Else:
  /// piece number `at` of all.
  __device__ __forceinline__ AttentionPiece piece_at(const DecodeStep& s, int at, int end) const {
    if (!even) {
      const int pair = at / pieces, i = pair / s.kv_heads, piece = at - pair * pieces;
      const int each = (steps[i] + pieces - 1) / pieces, from = min(piece * each, steps[i]);
      return {row[i],    entries[i], pair - i * s.kv_heads, piece, {from, min(from + each, steps[i])},
              piece == 0};
    }
    int i = 0;
    while (i + 1 < rows && start[i + 1] <= at) ++i;
    const int head = (at - start[i]) / steps[i], from = start[i] + head * steps[i], first = at - from;
    const int piece = static_cast<int>(blockIdx.x) - block_of(from);
    return {row[i], entries[i], head, piece, {first, min(steps[i], first + end - at)}, first == 0};
  }
  /// Even: the first step of a block of threads.
  __device__ __forceinline__ int first_step(int block) const {
    return static_cast<int>(static_cast<long long>(total) * block / blocks);
  }
  /// Pieces of a head of the computed row number i.
  __device__ __forceinline__ int pieces_of(int i, int head) const {
    if (!even) return pieces;
    const int from = start[i] + head * steps[i];
    return block_of(from + steps[i] - 1) - block_of(from) + 1;
  }

 private:
  /// Even: the block of threads that has a step.
  __device__ __forceinline__ int block_of(int step) const {
    return static_cast<int>((static_cast<unsigned>(step + 1) * static_cast<unsigned>(blocks) - 1U) /
                            static_cast<unsigned>(total));
  }
};

}  // namespace fathom::cuda
