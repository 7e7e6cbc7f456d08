// y = x W^T where each element is one chain of multiply-adds over ascending k, started from zero: a row of y
// is a function of that row of x and of W, in bits, whatever the number of rows. Three ways through memory,
// one arithmetic: many rows (columns of y in the lanes, W transposed panel by panel), some rows (rows in the
// lanes, W as it is), and a single row.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_gemm.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/transpose.h"

namespace fathom::cpu::FATHOM_ISA {

constexpr std::int64_t kPanel = 64;        // columns of y that share a transposed panel of W
constexpr std::int64_t kPanelDepth = 256;  // of k: a panel stays in the second-level cache
constexpr std::int64_t kPanelRows = 1024;  // rows of x for which a panel is transposed once
constexpr std::int64_t kSomeRows = 32;

template <typename T>
void linear_invariant_many_rows(T* y, const T* x, const T* w, const LinearShape& s) {
  constexpr std::int64_t W = kLanes<T>;
  const std::int64_t panels = (s.out + kPanel - 1) / kPanel;
  const std::int64_t row_blocks = (s.rows + kPanelRows - 1) / kPanelRows;
  const std::int64_t items = panels * row_blocks;
  const std::int64_t grain = (items + threads() - 1) / threads();
  const std::int64_t bytes = part_bytes<T>(kPanel * kPanelDepth) + part_bytes<T>(kPanel * kBlockRows * 4);
  const TileMemory memory((items + grain - 1) / grain * bytes);
  parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
    Parts parts(static_cast<char*>(memory.data()) + begin / grain * bytes);
    T* panel = parts.take<T>(kPanel * kPanelDepth);
    T* edge = parts.take<T>(kPanel * kBlockRows * 4);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t o = item % panels * kPanel;
      const std::int64_t columns = s.out - o < kPanel ? s.out - o : kPanel;
      const std::int64_t r0 = item / panels * kPanelRows;
      const std::int64_t r1 = r0 + kPanelRows < s.rows ? r0 + kPanelRows : s.rows;
      for (std::int64_t k = 0; k < s.in; k += kPanelDepth) {
        const std::int64_t depth = s.in - k < kPanelDepth ? s.in - k : kPanelDepth;
        const TileStart start = k == 0 ? TileStart::Zero : TileStart::Accumulate;
        transpose_in<T>(panel, kPanel, w + o * s.in + k, s.in, columns, depth, T(1));
        const std::int64_t whole = columns / W;
        tile_gemm<T>(r1 - r0, whole, depth, {x + r0 * s.x_row() + k, s.x_row(), 1}, panel, kPanel,
                     y + r0 * s.out + o, s.out, start);
        const std::int64_t rest = columns - whole * W;
        if (rest == 0) continue;
        // The last columns go through a padded tile, a few rows at a time.
        for (std::int64_t r = r0; r < r1; r += kBlockRows * 4) {
          const std::int64_t rows = r1 - r < kBlockRows * 4 ? r1 - r : kBlockRows * 4;
          T* out = y + r * s.out + o + whole * W;
          if (k > 0) {
            for (std::int64_t i = 0; i < rows; ++i) {
              for (std::int64_t c = 0; c < rest; ++c) edge[i * W + c] = out[i * s.out + c];
            }
          }
          tile_gemm<T>(rows, 1, depth, {x + r * s.x_row() + k, s.x_row(), 1}, panel + whole * W, kPanel, edge,
                       W, start);
          for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t c = 0; c < rest; ++c) out[i * s.out + c] = edge[i * W + c];
          }
        }
      }
    }
  });
}

/// Rows in the lanes: each weight is read once and multiplies a vector of rows.
template <typename T>
void linear_invariant_some_rows(T* y, const T* x, const T* w, const LinearShape& s) {
  constexpr std::int64_t W = kLanes<T>;
  constexpr std::int64_t kOuts = 48;
  const std::int64_t width = (s.rows + W - 1) / W * W;
  const std::int64_t items = (s.out + kOuts - 1) / kOuts;
  const std::int64_t grain = (items + threads() - 1) / threads();
  const std::int64_t bytes = part_bytes<T>(kOuts * width);
  const TileMemory memory(part_bytes<T>(s.in * width) + part_bytes<T>(width) +
                          (items + grain - 1) / grain * bytes);
  Parts parts(memory.data());
  T* columns = parts.take<T>(s.in * width);
  T* ones = parts.take<T>(width);
  char* tiles = parts.take<char>(0);
  transpose_in<T>(columns, width, x, s.x_row(), s.rows, s.in, T(1));
  for (std::int64_t i = 0; i < width; ++i) ones[i] = 1;
  parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
    T* tile = reinterpret_cast<T*>(tiles + begin / grain * bytes);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t o = item * kOuts;
      const std::int64_t outs = s.out - o < kOuts ? s.out - o : kOuts;
      tile_gemm<T>(outs, width / W, s.in, {w + o * s.in, s.in, 1}, columns, width, tile, width,
                   TileStart::Zero);
      transpose_out<T>(y + o, s.out, tile, width, s.rows, outs, ones);
    }
  });
}

/// W's squares are transposed in registers, so that columns of y are the lanes here too.
template <typename T>
void linear_invariant_one_row(T* y, const T* x, const T* w, const LinearShape& s) {
  constexpr std::int64_t W = kLanes<T>;
  const std::int64_t items = (s.out + W - 1) / W;
  const std::int64_t grain = 65536 / (s.in * W) + 1;
  parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t o = item * W;
      const std::int64_t outs = s.out - o < W ? s.out - o : W;
      const T* rows = w + o * s.in;
      Vec<T> sum = {};
      std::int64_t k = 0;
      for (; k + W <= s.in; k += W) {
        Vec<T> v[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = load<T>(rows + (i < outs ? i : 0) * s.in + k);
        transpose_square<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) sum += broadcast<T>(x[k + i]) * v[i];
      }
      for (; k < s.in; ++k) {
        T column[W];
        for (int i = 0; i < W; ++i) column[i] = rows[(i < outs ? i : 0) * s.in + k];
        sum += broadcast<T>(x[k]) * load<T>(column);
      }
      for (int i = 0; i < outs; ++i) y[o + i] = sum[i];
    }
  });
}

template <typename T>
void linear_invariant(T* y, const T* x, const T* w, const LinearShape& s) {
  if (s.rows == 1) {
    linear_invariant_one_row<T>(y, x, w, s);
  } else if (s.rows <= kSomeRows) {
    linear_invariant_some_rows<T>(y, x, w, s);
  } else {
    linear_invariant_many_rows<T>(y, x, w, s);
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
