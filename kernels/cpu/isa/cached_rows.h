// The new rows of a pass, checked: which sequences they are of, and where these have their entries.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

struct CacheRows {
  const std::int32_t* tables;
  const std::int32_t* sequences;
  const std::int32_t* lengths;

  CacheRows(const char* op, ConstView t, ConstView q, ConstView l, const CacheShape& s)
      : tables(input<std::int32_t>(op, "tables", t, s.sequences * s.table)),
        sequences(input<std::int32_t>(op, "sequences", q, s.rows)),
        lengths(input<std::int32_t>(op, "lengths", l, s.rows)) {
    if (s.kv_heads < 1) fail(op, "kv_heads", s.kv_heads, 1);
    check_size(op, "heads modulo kv_heads", s.heads % s.kv_heads, 0);
    check_size(op, "block modulo 16", s.block % 16, 0);
    if (s.bits != 16 && !is_cache_of_codes(s.bits)) fail(op, "bits", s.bits, 4);
    check_indices(op, "a sequence", sequences, s.rows, 0, s.sequences);
    check_indices(op, "a length", lengths, s.rows, 1, s.table * s.block + 1);
    for (std::int64_t i = 0; i < s.rows; ++i) {
      const std::int32_t* table = tables + sequences[i] * s.table;
      for (std::int64_t b = 0; b < (lengths[i] + s.block - 1) / s.block; ++b) {
        const std::int64_t block = s.block_of(table[b]);
        if (table[b] < 0 || block >= s.blocks) fail(op, "a block of a table", block, s.blocks);
      }
    }
  }
  /// The block of a row's own entry.
  std::int64_t block(std::int64_t row, const CacheShape& s) const {
    return s.block_of(tables[sequences[row] * s.table + (lengths[row] - 1) / s.block]);
  }
};

inline std::int64_t packed_row(const CacheShape& s) { return (s.heads + 2 * s.kv_heads) * s.head_dim; }

}  // namespace fathom::cpu::FATHOM_ISA
