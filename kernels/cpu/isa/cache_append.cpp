// Keys and values of new rows to a pool of blocks: as numbers, or as codes (kernels/cache_codes.h).
#include "kernels/cpu/isa/cache_codes.h"
#include "kernels/cpu/isa/cached_rows.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_memory.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int64_t kGrain = 16;  // rows

template <typename T>
void append_numbers(T* pool, const T* qkv, const CacheRows& r, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = packed_row(s);
  parallel_for(s.rows, kGrain, [=, &r, &s](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t inside = (r.lengths[i] - 1) % s.block;
      T* keys = pool + r.block(i, s) * s.block_elements() + inside;
      T* values = pool + r.block(i, s) * s.block_elements() + s.kv_heads * d * s.block + inside * d;
      const T* k = qkv + i * ld + s.heads * d;
      const T* v = k + s.kv_heads * d;
      for (std::int64_t g = 0; g < s.kv_heads; ++g) {
        for (std::int64_t e = 0; e < d; ++e) {
          keys[(g * d + e) * s.block] = k[g * d + e];
          values[g * s.block * d + e] = v[g * d + e];
        }
      }
    }
  });
}

/// Makes codes of one head after the other, by the thread that has it.
template <typename T>
struct HeadCoder {
  std::uint8_t* codes;  // [d + 1], one a byte; the last one is the upper half of an odd head's last byte
  float* shifted;       // [d]
  const T* means;       // of keys, [kv_heads, d]; null: none
  std::int64_t d;
  int bits;

  CodeScale key(const T* x, std::int64_t g) const {
    if (means == nullptr) return value(x);
    const T* mean = means + g * d;
    for (std::int64_t e = 0; e < d; ++e) shifted[e] = static_cast<float>(x[e]) - static_cast<float>(mean[e]);
    return encode_head(codes, shifted, d, bits);
  }
  CodeScale value(const T* x) const { return encode_head(codes, x, d, bits); }
};

/// What the threads' coders work in.
template <typename T>
struct CodeMemory {
  CodeMemory(const T* m, const CacheShape& s)
      : means(m),
        d(s.head_dim),
        bits(s.bits),
        each(part_bytes<std::uint8_t>(d + 1) + part_bytes<float>(d)),
        memory((s.rows + kGrain - 1) / kGrain * each) {}
  HeadCoder<T> of(std::int64_t begin) const {
    Parts parts(static_cast<char*>(memory.data()) + begin / kGrain * each);
    auto* codes = parts.take<std::uint8_t>(d + 1);
    codes[d] = 0;
    return {codes, parts.take<float>(d), means, d, bits};
  }
  const T* means;
  std::int64_t d;
  int bits;
  std::int64_t each;
  TileMemory memory;
};

template <typename T>
void append_codes(std::uint8_t* pool, const T* qkv, const T* means, const CacheRows& r, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = packed_row(s), bytes = cache_code_bytes(d, s.bits);
  const CodeMemory<T> memory(means, s);
  parallel_for(s.rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
    const HeadCoder<T> coder = memory.of(begin);
    const std::uint8_t* codes = coder.codes;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t inside = (r.lengths[i] - 1) % s.block;
      std::uint8_t* block = pool + r.block(i, s) * s.block_elements();
      auto* scales = reinterpret_cast<std::uint32_t*>(block + 2 * s.kv_heads * s.block * bytes) + inside;
      const T* k = qkv + i * ld + s.heads * d;
      for (std::int64_t g = 0; g < s.kv_heads; ++g) {
        scales[g * s.block] = word_of(coder.key(k + g * d, g));
        std::uint8_t* keys = block + g * s.block * bytes + inside;
        for (std::int64_t b = 0; b < bytes; ++b) {
          keys[b * s.block] =
              s.bits == 4 ? static_cast<std::uint8_t>(codes[2 * b] | codes[2 * b + 1] << 4) : codes[b];
        }
        scales[(s.kv_heads + g) * s.block] = word_of(coder.value(k + (s.kv_heads + g) * d));
        std::uint8_t* values = block + ((s.kv_heads + g) * s.block + inside) * bytes;
        for (std::int64_t b = 0; b < bytes; ++b) {
          values[b] = s.bits == 4 ? static_cast<std::uint8_t>(codes[b] | codes[bytes + b] << 4) : codes[b];
        }
      }
    }
  });
}

template <typename T>
void round_trip(T* out, const T* qkv, const T* means, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = packed_row(s), keys = s.heads * d;
  const CodeMemory<T> memory(means, s);
  parallel_for(s.rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
    const HeadCoder<T> coder = memory.of(begin);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* from = qkv + i * ld;
      T* to = out + i * ld;
      if (from != to) {
        for (std::int64_t e = 0; e < keys; ++e) to[e] = from[e];
      }
      for (std::int64_t g = 0; g < 2 * s.kv_heads; ++g) {
        const std::int64_t at = keys + g * d;
        const CodeScale scale = g < s.kv_heads ? coder.key(from + at, g) : coder.value(from + at);
        for (std::int64_t e = 0; e < d; ++e) to[at + e] = static_cast<T>(number_of(coder.codes[e], scale));
      }
    }
  });
}

/// Of keys; null: none.
template <typename T>
const T* means_of(const char* op, const CacheShape& s) {
  return optional_input<T>(op, "key_means", s.key_means, s.kv_heads * s.head_dim);
}

}  // namespace

void CpuBackend::cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences,
                              ConstView lengths, const CacheShape& s) {
  const char* op = "cache_append";
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input<T>(op, "qkv", qkv, s.rows * packed_row(s));
    const CacheRows rows(op, tables, sequences, lengths, s);
    const std::int64_t size = s.blocks * s.block_elements();
    if (s.bits < 16) {
      append_codes<T>(output<std::uint8_t>(op, "pool", pool, size), from, means_of<T>(op, s), rows, s);
    } else {
      append_numbers<T>(output<T>(op, "pool", pool, size), from, rows, s);
    }
  });
}

void CpuBackend::cache_round_trip(View out, ConstView qkv, const CacheShape& s) {
  const char* op = "cache_round_trip";
  if (!is_cache_of_codes(s.bits)) fail(op, "bits", s.bits, 4);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t size = s.rows * packed_row(s);
    round_trip<T>(output<T>(op, "out", out, size), input<T>(op, "qkv", qkv, size), means_of<T>(op, s), s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
